"""The platforms' own parsers, where they are installed, read what is written for them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from autotune.deploy.platforms.systemd import PREFIXES
from tests.autotune.deploy.platforms.exported_runs import combinations, exported, write

EVERY = list(combinations())


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def of(*targets: str) -> list[tuple[str, str, str]]:
    return [each for each in EVERY if each[1] in targets]


def has_compose() -> bool:
    docker = shutil.which("docker")
    return docker is not None and run(docker, "compose", "version", cwd=Path.cwd()).returncode == 0


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
@pytest.mark.parametrize(("source", "target", "engine"), of("compose"))
def test_compose_reads_its_file(source: str, target: str, engine: str, tmp_path: Path) -> None:
    write(exported(source, target, engine), tmp_path)
    done = run("docker", "compose", "config", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(("source", "target", "engine"), of("kubernetes")[:2])
def test_kustomize_puts_the_manifests_together(
    source: str, target: str, engine: str, tmp_path: Path
) -> None:
    write(exported(source, target, engine), tmp_path)
    done = run("kubectl", "kustomize", ".", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    # The Deployment asks for the ConfigMap by the name that kustomize gave it.
    hashed = [line.split()[-1] for line in done.stdout.splitlines() if "-config-" in line]
    assert len(hashed) == 2
    assert len(set(hashed)) == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize(("source", "target", "engine"), of("systemd"))
def test_systemd_accepts_the_unit(source: str, target: str, engine: str, tmp_path: Path) -> None:
    folder = write(exported(source, target, engine), tmp_path)
    unit = next(folder.glob("*.service"))
    text = unit.read_text()
    programs = {line.split()[0] for line in text.splitlines() if line.startswith("ExecStart=")}
    program = programs.pop().removeprefix("ExecStart=")
    assert program.startswith(f"{PREFIXES[engine]}/bin/")
    # The engine is not installed here; any program will do.
    unit.write_text(text.replace(f"ExecStart={program} ", "ExecStart=/bin/true "))
    done = run("systemd-analyze", "verify", str(unit), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("target", ["compose", "nim", "skypilot"])
def test_scripts_are_shell_and_may_be_run(target: str, tmp_path: Path) -> None:
    folder = write(exported("bare", target, "vllm"), tmp_path)
    scripts = sorted(folder.glob("*.sh"))
    assert {"smoke_test.sh", "benchmark.sh"} <= {script.name for script in scripts}
    for script in scripts:
        assert script.stat().st_mode & 0o111
        assert run("sh", "-n", str(script), cwd=tmp_path).returncode == 0
