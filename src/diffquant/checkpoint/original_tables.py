"""Names of tensors in diffusers, and in the files of a model's authors: a table for each family.

A line reads *name in diffusers, original name*; ``*`` is a number, and ``.weight`` and ``.bias`` follow both. Tensors with one
original name are concatenated along their rows in the order of the lines (a fused projection), and ``halves`` exchanges the two
halves of the rows (shift and scale of a last norm). Names that no line has stay as they are.
"""

FLUXES = """
context_embedder                                txt_in
x_embedder                                      img_in
transformer_blocks.*.attn.to_q                  double_blocks.*.img_attn.qkv
transformer_blocks.*.attn.to_k                  double_blocks.*.img_attn.qkv
transformer_blocks.*.attn.to_v                  double_blocks.*.img_attn.qkv
transformer_blocks.*.attn.add_q_proj            double_blocks.*.txt_attn.qkv
transformer_blocks.*.attn.add_k_proj            double_blocks.*.txt_attn.qkv
transformer_blocks.*.attn.add_v_proj            double_blocks.*.txt_attn.qkv
transformer_blocks.*.attn.norm_q.weight         double_blocks.*.img_attn.norm.query_norm.scale
transformer_blocks.*.attn.norm_k.weight         double_blocks.*.img_attn.norm.key_norm.scale
transformer_blocks.*.attn.norm_added_q.weight   double_blocks.*.txt_attn.norm.query_norm.scale
transformer_blocks.*.attn.norm_added_k.weight   double_blocks.*.txt_attn.norm.key_norm.scale
transformer_blocks.*.attn.to_out.0              double_blocks.*.img_attn.proj
transformer_blocks.*.attn.to_add_out            double_blocks.*.txt_attn.proj
single_transformer_blocks.*.attn.norm_q.weight  single_blocks.*.norm.query_norm.scale
single_transformer_blocks.*.attn.norm_k.weight  single_blocks.*.norm.key_norm.scale
proj_out                                        final_layer.linear
norm_out.linear                                 final_layer.adaLN_modulation.1  halves
"""
FLUX = """
time_text_embed.timestep_embedder.linear_1      time_in.in_layer
time_text_embed.timestep_embedder.linear_2      time_in.out_layer
time_text_embed.text_embedder.linear_1          vector_in.in_layer
time_text_embed.text_embedder.linear_2          vector_in.out_layer
time_text_embed.guidance_embedder.linear_1      guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2      guidance_in.out_layer
transformer_blocks.*.norm1.linear               double_blocks.*.img_mod.lin
transformer_blocks.*.norm1_context.linear       double_blocks.*.txt_mod.lin
transformer_blocks.*.ff.net.0.proj              double_blocks.*.img_mlp.0
transformer_blocks.*.ff.net.2                   double_blocks.*.img_mlp.2
transformer_blocks.*.ff_context.net.0.proj      double_blocks.*.txt_mlp.0
transformer_blocks.*.ff_context.net.2           double_blocks.*.txt_mlp.2
single_transformer_blocks.*.norm.linear         single_blocks.*.modulation.lin
single_transformer_blocks.*.attn.to_q           single_blocks.*.linear1
single_transformer_blocks.*.attn.to_k           single_blocks.*.linear1
single_transformer_blocks.*.attn.to_v           single_blocks.*.linear1
single_transformer_blocks.*.proj_mlp            single_blocks.*.linear1
single_transformer_blocks.*.proj_out            single_blocks.*.linear2
"""
FLUX_2 = """
time_guidance_embed.timestep_embedder.linear_1  time_in.in_layer
time_guidance_embed.timestep_embedder.linear_2  time_in.out_layer
time_guidance_embed.guidance_embedder.linear_1  guidance_in.in_layer
time_guidance_embed.guidance_embedder.linear_2  guidance_in.out_layer
double_stream_modulation_img.linear             double_stream_modulation_img.lin
double_stream_modulation_txt.linear             double_stream_modulation_txt.lin
single_stream_modulation.linear                 single_stream_modulation.lin
transformer_blocks.*.ff.linear_in               double_blocks.*.img_mlp.0
transformer_blocks.*.ff.linear_out              double_blocks.*.img_mlp.2
transformer_blocks.*.ff_context.linear_in       double_blocks.*.txt_mlp.0
transformer_blocks.*.ff_context.linear_out      double_blocks.*.txt_mlp.2
single_transformer_blocks.*.attn.to_qkv_mlp_proj  single_blocks.*.linear1
single_transformer_blocks.*.attn.to_out         single_blocks.*.linear2
"""
WAN = """
condition_embedder.time_embedder.linear_1       time_embedding.0
condition_embedder.time_embedder.linear_2       time_embedding.2
condition_embedder.text_embedder.linear_1       text_embedding.0
condition_embedder.text_embedder.linear_2       text_embedding.2
condition_embedder.time_proj                    time_projection.1
condition_embedder.image_embedder.norm1         img_emb.proj.0
condition_embedder.image_embedder.ff.net.0.proj  img_emb.proj.1
condition_embedder.image_embedder.ff.net.2      img_emb.proj.3
condition_embedder.image_embedder.norm2         img_emb.proj.4
blocks.*.attn1.to_q                             blocks.*.self_attn.q
blocks.*.attn1.to_k                             blocks.*.self_attn.k
blocks.*.attn1.to_v                             blocks.*.self_attn.v
blocks.*.attn1.to_out.0                         blocks.*.self_attn.o
blocks.*.attn1.norm_q                           blocks.*.self_attn.norm_q
blocks.*.attn1.norm_k                           blocks.*.self_attn.norm_k
blocks.*.attn2.to_q                             blocks.*.cross_attn.q
blocks.*.attn2.to_k                             blocks.*.cross_attn.k
blocks.*.attn2.to_v                             blocks.*.cross_attn.v
blocks.*.attn2.to_out.0                         blocks.*.cross_attn.o
blocks.*.attn2.norm_q                           blocks.*.cross_attn.norm_q
blocks.*.attn2.norm_k                           blocks.*.cross_attn.norm_k
blocks.*.attn2.add_k_proj                       blocks.*.cross_attn.k_img
blocks.*.attn2.add_v_proj                       blocks.*.cross_attn.v_img
blocks.*.attn2.norm_added_k                     blocks.*.cross_attn.norm_k_img
blocks.*.norm2                                  blocks.*.norm3
blocks.*.ffn.net.0.proj                         blocks.*.ffn.0
blocks.*.ffn.net.2                              blocks.*.ffn.2
blocks.*.scale_shift_table                      blocks.*.modulation
scale_shift_table                               head.modulation
proj_out                                        head.head
"""
Z_IMAGE = """
layers.*.attention.to_q                         layers.*.attention.qkv
layers.*.attention.to_k                         layers.*.attention.qkv
layers.*.attention.to_v                         layers.*.attention.qkv
layers.*.attention.to_out.0                     layers.*.attention.out
layers.*.attention.norm_q                       layers.*.attention.q_norm
layers.*.attention.norm_k                       layers.*.attention.k_norm
noise_refiner.*.attention.to_q                  noise_refiner.*.attention.qkv
noise_refiner.*.attention.to_k                  noise_refiner.*.attention.qkv
noise_refiner.*.attention.to_v                  noise_refiner.*.attention.qkv
noise_refiner.*.attention.to_out.0              noise_refiner.*.attention.out
noise_refiner.*.attention.norm_q                noise_refiner.*.attention.q_norm
noise_refiner.*.attention.norm_k                noise_refiner.*.attention.k_norm
context_refiner.*.attention.to_q                context_refiner.*.attention.qkv
context_refiner.*.attention.to_k                context_refiner.*.attention.qkv
context_refiner.*.attention.to_v                context_refiner.*.attention.qkv
context_refiner.*.attention.to_out.0            context_refiner.*.attention.out
context_refiner.*.attention.norm_q              context_refiner.*.attention.q_norm
context_refiner.*.attention.norm_k              context_refiner.*.attention.k_norm
all_x_embedder.2-1                              x_embedder
all_final_layer.2-1.linear                      final_layer.linear
all_final_layer.2-1.adaLN_modulation.1          final_layer.adaLN_modulation.1
"""
# of its blocks only the middle one: `original_names` numbers the others through
UNET = """
time_embedding.linear_1                         time_embed.0
time_embedding.linear_2                         time_embed.2
add_embedding.linear_1                          label_emb.0.0
add_embedding.linear_2                          label_emb.0.2
class_embedding.linear_1                        label_emb.0.0
class_embedding.linear_2                        label_emb.0.2
class_embedding                                 label_emb
conv_in                                         input_blocks.0.0
mid_block.resnets.0                             middle_block.0
mid_block.attentions.0                          middle_block.1
mid_block.resnets.1                             middle_block.2
conv_norm_out                                   out.0
conv_out                                        out.2
"""
UNET_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
