"""The whole way from recording to a loaded checkpoint on a device that is not the CPU, as far as that shows without one."""

import subprocess
import sys


def test_everything_stays_on_the_device_of_the_pipeline():
    done = subprocess.run([sys.executable, "-m", "tests.accelerator"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "mixing fails",
        "dmq",
        "adp-dm",
        "noise estimate",
        "proportional",
        "sensitivity",
        "accuquant with guidance",
    ]
