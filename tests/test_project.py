"""What the checks of the repository run, in one place and the others: make, the hooks before a commit, and the workflow."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def workflow() -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    return content


def made_by(job: dict[str, Any]) -> list[str]:
    """What a job of the workflow runs in its own steps."""
    return [step["run"] for step in job["steps"] if "run" in step]


def test_hooks_before_a_commit_are_the_commands_of_make_lint_and_fetch_nothing():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local" and {hook["language"] for hook in repository["hooks"]} == {"system"}
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    commands = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert not any(hook["pass_filenames"] for hook in repository["hooks"])


def test_the_workflow_runs_what_has_to_pass():
    jobs = workflow()["jobs"]
    required = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert made_by(jobs["check"]) == required == ["make lint", "make test"]
    assert made_by(jobs["all"]) == ["make test-all"]
    assert workflow()[True]["schedule"]  # YAML reads the key `on` as true


def test_the_workflow_begins_with_the_oldest_python():
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert workflow()["jobs"]["check"]["strategy"]["matrix"]["python"][0] == oldest


def test_issue_templates_name_their_fields_once():
    for page in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        names = [field["id"] for field in yaml.safe_load(page.read_text()).get("body", [])]
        assert len(names) == len(set(names)), page.name
