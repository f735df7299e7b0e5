import subprocess

from finetuning import machine


def test_the_commit_is_marked_if_code_differs_but_not_if_records_do(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()
    for path in ("finetuning/file", "results/file", "benchmarks/results.json", "benchmarks/run.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("one")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "finetuning" / "machine.py"))
    assert machine.git_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert machine.git_commit() == git("rev-parse", "HEAD")
    for record in ("results/file", "benchmarks/results.json"):
        (tmp_path / record).write_text("two")
        assert machine.git_commit() == git("rev-parse", "HEAD")
    for code in ("finetuning/file", "benchmarks/run.py"):
        (tmp_path / code).write_text("two")
        assert machine.git_commit() == git("rev-parse", "HEAD") + "+"
        (tmp_path / code).write_text("one")


def test_versions_and_memory():
    assert machine.versions().keys() >= {"python", "torch", "transformers", "scikit-learn"}
    assert machine.process_peak_memory() > 10_000_000
