"""nginx in front of bridges, with what README.md shows as its configuration."""
from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from test_edge import needs, wait_until

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
CONFIG = """
daemon off; master_process off; pid %(folder)s/pid; error_log %(folder)s/error.log;
events { worker_connections 1024; }
http {
    access_log %(folder)s/access.log;
    client_body_temp_path %(folder)s/body; proxy_temp_path %(folder)s/proxy;
    fastcgi_temp_path %(folder)s/f; uwsgi_temp_path %(folder)s/u; scgi_temp_path %(folder)s/s;
    %(http)s
}
"""
# what README.md shows, in place of which the tests have ports and files of their own
SHOWN = {"port": "listen 443 ssl;", "cert": "ssl_certificate /etc/ssl/certs/www.example.org.pem;",
         "key": "ssl_certificate_key /etc/ssl/private/www.example.org.pem;"}
UPSTREAM = "upstream bridge { server 127.0.0.1:8000;"
LOCATION = re.compile(r"    location /edge/ \{\n +proxy_pass http://bridge/;\n.*?\n    \}\n", re.DOTALL)
README = Path(__file__).resolve().parent.parent / "README.md"


def read_shown(bridge_ports, **used):
    """Return the block of README.md for nginx, with what is `used` in place of what is SHOWN.

    bridge_ports: {prefix: port}; for each, there is what is shown for the bridge under /edge/.
    """
    (block,) = re.findall(r"^```nginx\n(.*?)^```", README.read_text(encoding="utf-8"),
                          re.DOTALL | re.MULTILINE)
    for name, text in used.items():
        assert block.count(SHOWN[name]) == 1, f"README.md: {SHOWN[name]}"
        block = block.replace(SHOWN[name], text)
    (location,), (upstream,) = LOCATION.findall(block), re.findall(f"{UPSTREAM}.*\n", block)
    for part in (location, upstream):
        made = (part.replace("/edge/", f"/{prefix}/").replace("bridge", f"bridge_{prefix}")
                .replace(":8000", f":{port}") for prefix, port in bridge_ports.items())
        block = block.replace(part, "".join(made))
    return block


def pick_port():
    """Return a free port, from below those that systems give to sockets that ask for any.

    One of those may be somebody's before nginx has it; and a connection to it may be its own peer.
    """
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            return port
    pytest.fail("no port between 20,000 and 32,000 is free")


@contextlib.contextmanager
def run_nginx(folder, port, *, certificate=None, **bridge_ports):
    """Run nginx at a port, as README.md says, with its files in a new folder.

    certificate: its file and its key's; without it there is no TLS. bridge_ports: {prefix: port}.
    """
    needs("security", os.path.exists(NGINX), "nginx: run tests/setup-security.sh")
    used = {"cert": f"ssl_certificate {certificate[0]};",
            "key": f"ssl_certificate_key {certificate[1]};"} if certificate else \
        {"cert": "", "key": ""}
    http = read_shown(bridge_ports, **used,
                      port=f"listen 127.0.0.1:{port}{' ssl' if certificate else ''};")
    folder.mkdir()
    (folder / "nginx.conf").write_text(CONFIG % {"folder": folder, "http": http})
    process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")],
                               stderr=subprocess.PIPE)

    def is_up():
        assert process.poll() is None, process.stderr.read()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return True

    try:
        wait_until(is_up, 60)
        yield
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()
