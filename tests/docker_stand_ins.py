"""Stand-ins for images that cannot be pulled: Debian 12 with its Python 3.11 for python:3.11-slim, and its Prometheus.

Debian's Prometheus is an older one (2.42). Grafana is not in Debian: where images cannot be pulled, it is left out.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from docker_engine import Docker, run

BASE = "gradwire-test/python:3.11"
PROMETHEUS = "gradwire-test/prometheus:2.42"
_INCLUDED = "python3,python3-pip,python3-venv,ca-certificates"
# What python:3.11-slim has none of, either.
_LEFT_OUT = (
    *("*/__pycache__", "./proc/*", "./var/lib/apt/lists/*", "./var/cache/*"),
    *("./usr/share/doc/*", "./usr/share/man/*", "./usr/share/locale/*"),
)
_PROMETHEUS = """
FROM {base}
COPY usr/bin/prometheus usr/bin/promtool /bin/
RUN install -d -o 65534 -g 65534 /prometheus /etc/prometheus
USER 65534:65534
ENTRYPOINT ["/bin/prometheus"]
"""


def import_base(docker: Docker, directory: Path) -> None:
    """Make the base image, from a file that is kept in the directory for the next time."""
    archive = directory / "base.tar"
    if not archive.exists():
        root = directory / "base"
        if root.exists():
            # Left by a test that was killed: debootstrap has proc mounted while it works.
            if (root / "proc").is_mount():
                run(["umount", str(root / "proc")])
            shutil.rmtree(root)
        bootstrap = ["debootstrap", "--variant=minbase", f"--include={_INCLUDED}", "bookworm", str(root)]
        run(bootstrap, timeout=1800)
        # Where that image has its Python.
        for name, target in (("python3", "/usr/bin/python3"), ("python", "python3"), ("pip", "/usr/bin/pip3")):
            (root / "usr/local/bin" / name).symlink_to(target)
        made = archive.with_suffix(".new")
        run(["tar", "-C", str(root), *(f"--exclude={each}" for each in _LEFT_OUT), "-cf", str(made), "."])
        made.replace(archive)
        shutil.rmtree(root)
    path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    docker("import", "--change", f"ENV {path} LANG=C.UTF-8", str(archive), BASE)


def build_prometheus(docker: Docker, directory: Path) -> None:
    """Make an image of Debian's Prometheus on top of the base image."""
    context = directory / "prometheus"
    if not (context / "usr/bin/prometheus").exists():
        context.mkdir(exist_ok=True)
        # Not installed: nothing else of the machine is to change.
        run(["apt-get", "-o", "DPkg::Lock::Timeout=300", "update", "-q"])
        subprocess.run(["apt-get", "download", "-q", "prometheus"], cwd=context, check=True, timeout=600)
        (package,) = context.glob("prometheus_*.deb")
        run(["dpkg-deb", "--extract", str(package), str(context)])
    (context / "Dockerfile").write_text(_PROMETHEUS.format(base=BASE))
    (context / ".dockerignore").write_text("*\n!usr/bin/prometheus\n!usr/bin/promtool\n")
    docker("build", "--quiet", "--network=host", "--tag", PROMETHEUS, str(context))
