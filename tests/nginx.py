"""nginx in front of a bridge, with the bridge under /prefix/, as the README says."""
from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess

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
    upstream bridge { server 127.0.0.1:%(bridge)d; keepalive 8; }
    map $http_upgrade $connection_upgrade { default upgrade; '' ''; }
    server {
        listen 127.0.0.1:%(port)d;
        client_max_body_size 0;
        location /prefix/ {
            proxy_pass http://bridge/;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header Upgrade $http_upgrade;
            proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 3600s;
        }
    }
}
"""


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
def run_nginx(folder, port, bridge_port):
    """Run nginx at a port, with its files in a new folder."""
    needs("security", os.path.exists(NGINX), "nginx: run tests/setup-security.sh")
    folder.mkdir()
    (folder / "nginx.conf").write_text(CONFIG % {"folder": folder, "port": port,
                                                 "bridge": bridge_port})
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
