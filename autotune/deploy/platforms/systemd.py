"""systemd: a service of one machine, without containers."""

from __future__ import annotations

import shlex

from autotune.deploy.beside import beside
from autotune.deploy.platforms.carried import PORT, Carried, carry
from autotune.deploy.platforms.container import CONFIG
from autotune.deploy.platforms.head import head
from autotune.deploy.target import BUNDLED, Deployment, Exported, Target
from autotune.deploy.yaml_text import comment

CARRIES = (BUNDLED, "vllm", "sglang")
# Where the engine's virtual environment is; a drop-in changes it (systemctl edit).
PREFIXES = {BUNDLED: "/opt/autotune", "vllm": "/opt/vllm", "sglang": "/opt/sglang"}


def systemd_target() -> Target:
    """The target `systemd`."""
    return Target("systemd", export_systemd, CARRIES)


def export_systemd(deployment: Deployment) -> Exported:
    """A unit, with the engine's file beside it."""
    carried = carry(deployment, CARRIES, contained=False)
    unit = f"{carried.slug}.service"
    install = (
        f"install -D -m 644 {carried.file} {CONFIG}/{carried.file} && "
        f"install -m 644 {unit} /etc/systemd/system/ && "
        f"systemctl daemon-reload && systemctl enable --now {unit}"
    )
    return Exported(
        {
            unit: _unit(carried, deployment, install),
            carried.file: carried.text,
            **beside(deployment, served_model=carried.name, start=f"systemctl start {unit}"),
        },
        carried.lost,
        carried.warnings,
    )


def _unit(carried: Carried, deployment: Deployment, install: str) -> str:
    prefix = PREFIXES[carried.engine]
    top = head(
        "systemd",
        "systemd unit",
        carried,
        deployment.evidence,
        use=f"as root: {install}",
        evidence_in=carried.file,
    )
    lines = [line for text in top for line in (comment(text, indent="  ") if text else [""])]
    start, *words = carried.command(f"{CONFIG}/{carried.file}")
    host = words.index("--host") + 1
    words[host] = "127.0.0.1"
    lines += [
        "[Unit]",
        f"Description={carried.title} serving {carried.name}".replace("%", "%%"),
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        "Type=exec",
        "DynamicUser=yes",
        f"StateDirectory={carried.slug}",
        f"Environment=HOME=%S/{carried.slug}",
        f"Environment=PATH={prefix}/bin:/usr/local/bin:/usr/bin:/bin",
    ]
    for name, (value, notes) in carried.environment.items():
        lines += [line for note in notes for line in comment(note, indent="  ")]
        quoted = _unread(value).replace('"', '\\"')
        lines.append(f'Environment="{name}={quoted}"')
    if carried.from_hub or carried.key_variable:
        names = [n for n in ("HF_TOKEN" if carried.from_hub else None, carried.key_variable) if n]
        lines += [
            *comment(f"{' and '.join(names)}, where wanted; a file that only root may read"),
            f"EnvironmentFile=-{CONFIG}/{carried.slug}.env",
        ]
    # In a command `$` names a variable, too.
    command = [_unread(word).replace("$", "$$") for word in (f"{prefix}/bin/{start}", *words)]
    lines += [
        *comment(
            f"Reached from this machine alone; put a proxy in front, or --host, to open it. Port "
            f"{PORT}."
        ),
        f"ExecStart={shlex.join(command)}",
        *comment("Running requests are finished first."),
        "KillSignal=SIGTERM",
        "TimeoutStopSec=150",
        "Restart=on-failure",
        "RestartSec=5",
        "LimitNOFILE=65535",
        "NoNewPrivileges=yes",
        "PrivateTmp=yes",
        "ProtectSystem=strict",
        *comment("Every user must be able to read the model, which may lie in a home folder."),
        "ProtectHome=read-only",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _unread(text: str) -> str:
    """Part of a word in which systemd is to find no escape (`\\`) and no specifier (`%`)."""
    return text.replace("\\", "\\\\").replace("%", "%%")
