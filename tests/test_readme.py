"""Checks of the pages: commands, links, the layout section and the requirements."""

import ast
import re
import shlex
import sys

import pytest
from helpers import REPOSITORY
from packaging.requirements import Requirement

import download_prepare_dataset
import predict
import reproduce
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from finetuning.reporting.experiments import EXPERIMENTS, SEED
from finetuning.reporting.records import run_folder

PARSERS = {
    "download_prepare_dataset.py": download_prepare_dataset,
    "train_gpt.py": train_gpt,
    "train_bert_hf.py": train_bert_hf,
    "train_sklearn_logreg.py": train_sklearn_logreg,
    "reproduce.py": reproduce,
    "predict.py": predict,
}
PAGES = [
    "README.md",
    "README.ja.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "tests/README.md",
    *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")),
]


def read(page):
    return (REPOSITORY / page).read_text(encoding="utf-8")


def code_blocks(text):
    """Return the lines of the shell commands of a page."""
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def commands(text):
    """Return what each command of a page passes to Python: [script, argument, ...]."""
    matches = [
        re.match(r"(?:.* && |torchrun (?:--n\w+ \d+ |--rdzv\w+ \S+ )+)?(?:python )?(\w+\.py\b.*)$", line)
        for line in code_blocks(text)
    ]
    return [shlex.split(match[1], comments=True) for match in matches if match]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page):
    for script, *arguments in commands(read(page)):
        if script in PARSERS:
            PARSERS[script].parse_args(arguments)


def test_the_readme_uses_every_script():
    assert {script for script, *_ in commands(read("README.md"))} == set(PARSERS)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: f"{experiment.number} {experiment.name}")
def test_every_experiment_has_its_command_on_a_page_and_its_folder(experiment):
    page = "README.md" if experiment.number <= 8 else "docs/experiments.md"
    script, *arguments = shlex.split(experiment.command_line(SEED))[1:]
    assert [script, *arguments] in commands(read(page))
    args = PARSERS[script].parse_args(arguments)
    folder = run_folder(args, PARSERS[script].run_name(args))
    assert folder.as_posix() == experiment.run_folder(SEED)


def test_both_languages_have_the_same_structure():
    english, japanese = (read(page) for page in ("README.md", "README.ja.md"))
    assert code_blocks(japanese) == code_blocks(english)
    for pattern in (r"^#+ (?=\d)(.*?[.])", r"^(#+) ", r"^(\s*-) ", r"^<!-- (.*) -->", r"`(--[^`]*)`"):
        assert sorted(re.findall(pattern, japanese, re.MULTILINE)) == sorted(re.findall(pattern, english, re.MULTILINE))
    japanese_links, english_links = ({link for link in links(page) if link[0] != "#"} for page in (japanese, english))
    assert japanese_links - {"README.md"} == english_links - {"README.ja.md"}


def links(text):
    """Return the targets of a page's links and images."""
    return set(re.findall(r"\]\(([^)\s]+)\)", text))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_has_an_existing_target(page):
    for link in links(read(page)):
        if link.startswith(("https://", "../../actions/")):  # on GitHub
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_layout_names_every_script_and_folder(page):
    layout = read(page).split("\ndownload_prepare_dataset.py ")[1].split("```")[0] + " download_prepare_dataset.py"
    assert set(re.findall(r"\w+\.py", layout)) == {path.name for path in REPOSITORY.glob("*.py")}
    for folder in ("finetuning", "benchmarks", "results", "docs", "tests"):
        assert f"{folder}/" in layout
        assert (REPOSITORY / folder).is_dir()


def test_ci_installs_and_runs_what_the_readme_says():
    ci = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    install = "-r requirements-extra.txt -r requirements-dev.txt -c constraints.txt"
    assert f"pip install {install} && python -m pytest -n auto\n" in read("README.md")
    assert install in ci
    assert "python -m pytest -n auto" in ci.splitlines()
    assert "run: .ci/run" in (REPOSITORY / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")


def requirements(name):
    """Return {package: requirement} of a requirements file."""
    lines = [line for line in read(name).splitlines() if line and not line.startswith("#")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in map(Requirement, lines)}


def test_constraints_are_within_the_bounds_of_the_requirements():
    exact = requirements("constraints.txt")
    for package, requirement in requirements("requirements-extra.txt").items():
        (version,) = exact[package].specifier
        assert version.operator == "=="
        assert requirement.specifier.contains(version.version)


def test_every_imported_package_is_required():
    """All packages are in requirements-extra.txt, except TensorBoard, which is optional."""
    ours = {path.stem for path in REPOSITORY.glob("*.py")} | {"finetuning", "benchmarks"}
    renamed = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}
    imported = set()
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("finetuning/**/*.py"), *REPOSITORY.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            imported |= {name.partition(".")[0] for name in names}
    listed = {*requirements("requirements-extra.txt"), "tensorboard"}
    assert {renamed.get(name, name) for name in imported - ours - sys.stdlib_module_names} <= listed
