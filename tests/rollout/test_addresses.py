"""Addresses of servers: both families, names that do not resolve, proxies in the environment, and whoever else may
answer there."""

import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dcpo_megatron.rollout import RolloutError
from dcpo_megatron.rollout.addresses import bare, in_url, own_address
from dcpo_megatron.rollout.server import Server, ServerError, check_url
from dcpo_megatron.rollout.serving import ServerPlan, ServingError, start_servers
from dcpo_megatron.rollout.serving.command import environment
from dcpo_megatron.rollout.serving.shared_files import SharedFiles
from dcpo_megatron.weights.publish.process_group import _own_address
from tests.sglang_servers import loopback_ipv6

ipv6 = pytest.mark.skipif(loopback_ipv6() != "::1", reason="this host has no IPv6")


def test_an_ipv6_address_has_brackets_in_a_url_and_none_elsewhere():
    for host in ("::1", "fd00::2", "2001:db8::a:1"):
        assert bare(in_url(host)) == bare(host) == host and in_url(in_url(host)) == in_url(host) == f"[{host}]"
    assert [in_url(host) for host in ("s1", "127.0.0.1", "s1.example.org")] == ["s1", "127.0.0.1", "s1.example.org"]


@ipv6
def test_the_rendezvous_is_at_the_address_that_leads_to_the_server_whatever_its_family(monkeypatch):
    assert own_address("::1", 1) == own_address("[::1]", 1) == "::1" and own_address("localhost", 1) == "127.0.0.1"

    def resolver(host, port, **_):
        if host == "gone.test":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        six = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", port, 0, 0))
        # A family that does not lead there comes first.
        none = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::ffff:0.0.0.1:1", port))
        four = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", port))
        return {"six.test": [six], "both.test": [none, four]}[host]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    assert _own_address("http://six.test:30000") == "::1" and _own_address("http://both.test:30000") == "127.0.0.1"
    with pytest.raises(RolloutError, match=r"no way to http://gone.test:30000 .*Temporary failure.*publish.address"):
        _own_address("http://gone.test:30000")


def test_an_address_that_is_none_is_refused_with_the_form_that_is_wanted():
    for url in ("http://[::1]:30000", "http://[fd00::2]:1", "https://s1", "http://10.0.0.1:30000/prefix"):
        check_url(url)
    for url in ("http://::1:30000", "http://fd00::2:30000", "http://[::1", "http://[s1]:1"):
        with pytest.raises(ValueError, match=r"brackets, such as http://\[::1\]:30000"):
            Server(url)
    for url in ("::1:30000", "s1:30000", "ftp://s1", "http://s1:70000", "http://"):
        with pytest.raises(ValueError, match="http://host:port"):
            Server(url)


@ipv6
def test_servers_on_an_ipv6_address_are_listed_in_brackets_and_one_that_is_not_this_hosts_is_refused(
    demo_start, tmp_path, monkeypatch
):
    def planned(host: str, **options):
        return start_servers(demo_start, 2, command=[sys.executable], device="cpu", host=host, logs=tmp_path, **options)

    for host in ("::1", "[::1]"):
        found = planned(host, port=23100)
        assert found.urls == ["http://[::1]:23100", "http://[::1]:23101"]
        words = found.processes[0]._words
        assert words[words.index("--host") + 1] == "::1"
    assert planned("127.0.0.1", port=23100, advertise="fd00::9").urls[0] == "http://[fd00::9]:23100"
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        with pytest.raises(ServingError, match="in use"):
            planned("::1", port=taken.getsockname()[1])
    with pytest.raises(ServingError, match=r"cannot listen on \[2001:db8::77\]"):
        planned("2001:db8::77", port=23100, api_key="k")
    with pytest.raises(ServingError, match=r"--host no-such-host\.invalid does not resolve"):
        planned("no-such-host.invalid", port=23100, api_key="k")
    # Every interface of a family that this host's name does not have: nobody would reach the servers by it.
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(ServingError, match=r"no-such-host\.invalid .*--advertise"):
        planned("::", port=23100, api_key="k")
    assert planned("::", port=23100, api_key="k", advertise="fd00::9").urls[0] == "http://[fd00::9]:23100"


def test_a_name_that_is_the_loopback_here_is_refused_and_servers_are_asked_where_they_listen(
    demo_start, tmp_path, monkeypatch
):
    def planned(**options):
        return start_servers(demo_start, command=[sys.executable], device="cpu", logs=tmp_path, api_key="k", **options)

    stock = socket.getaddrinfo
    found = {"own.test": "127.0.1.1"}  # as Debian writes it
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **named: stock(found.get(host, host), *rest, **named)
    )
    with pytest.raises(ServingError, match=r"--host own.test is 127.0.1.1 .*--host 0.0.0.0 --advertise own.test"):
        planned(host="own.test", port=23100)
    for host, asked in (("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")):
        running = planned(host=host, port=23100, advertise="own.test")
        assert running.urls == ["http://own.test:23100"]
        assert running.processes[0]._server.url == f"http://{asked}:23100"


PROXY = {"http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("given", "lower", "upper"),
    [
        ({}, "", ""),
        ({"no_proxy": "a.example, 10.0.0.0/8"}, "a.example,10.0.0.0/8,", "a.example,10.0.0.0/8,"),
        ({"NO_PROXY": ".local"}, ".local,", ".local,"),
        ({"no_proxy": "a", "NO_PROXY": "b,127.0.0.1"}, "a,", "b,127.0.0.1,"),
    ],
)
def test_a_servers_own_addresses_are_exempt_from_proxies_beside_what_the_user_exempts(given, lower, upper):
    env = environment(ServerPlan("M", ("python",), "cpu", host="fd00::2"), 1, PROXY | given)
    for name, begin in (("no_proxy", lower), ("NO_PROXY", upper)):
        assert env[name].startswith(begin)
        entries = env[name].split(",")
        assert {"127.0.0.1", "localhost", "::1", "fd00::2"} <= set(entries) and len(entries) == len(set(entries))
    assert env["http_proxy"] == PROXY["http_proxy"]  # others are still reached through it


def test_a_server_on_every_interface_speaks_to_itself_by_loopback_and_a_star_stays_one():
    wide = environment(ServerPlan("M", ("python",), "cpu", host="::", api_key="k"), 1, PROXY)
    assert wide["no_proxy"].split(",") == ["127.0.0.1", "localhost", "::1"]
    star = environment(ServerPlan("M", ("python",), "cpu"), 1, PROXY | {"no_proxy": "*"})
    assert star["no_proxy"] == star["NO_PROXY"] == "*"  # "*,127.0.0.1" would exempt nothing else


class Whoever:
    """A service at an address: ``answer`` is (status, content type, body) to every request, or the bytes to send
    instead of HTTP."""

    def __init__(self, answer, host: str = "127.0.0.1"):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                    return
                status, kind, body = answer
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Location", "/login")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._http = type("Http", (ThreadingHTTPServer,), {"address_family": family})((host, 0), Handler)
        self.url = f"http://{in_url(host)}:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._http.shutdown()
        self._http.server_close()


SGLANG = (200, "application/json", '{"model_path": "m", "weight_version": "unpublished"}')


@pytest.mark.parametrize(
    ("answer", "final", "said"),
    [
        ((401, "application/json", '{"error": "Unauthorized"}'), True, r"status 401: .*DCPO_SGLANG_API_KEY"),
        ((403, "text/plain", ""), True, r"status 403: .*servers.api_key_file"),
        ((404, "text/html", "<h1>nginx</h1>"), True, r"status 404: .*another service"),
        ((405, "text/plain", "no"), True, r"status 405: .*another service"),
        ((302, "text/html", ""), True, r"status 302: .*another service"),
        ((407, "text/plain", ""), True, r"status 407: .*proxy"),
        (
            (502, "text/html", "Bad Gateway"),
            False,
            r"status 502: Bad Gateway; something between \(a proxy, a gateway\)",
        ),
        ((504, "text/html", ""), False, r"status 504: .*gateway"),
        ((503, "text/plain", ""), False, r"status 503: .*not ready"),
        ((429, "text/plain", "slowly"), False, "status 429"),
        ((200, "text/html", "<title>Grafana</title>"), True, "not by an SGLang server .*Grafana"),
        ((200, "application/json", '{"status": "ok"}'), True, "not by an SGLang server"),
        ((200, "application/json", "{"), True, "not JSON"),
        (b"-ERR unknown command 'GET'\r\n\r\n", True, "another service"),
    ],
)
def test_whoever_else_answers_is_told_with_the_status_and_what_to_do(answer, final, said):
    with Whoever(answer) as one:
        server = Server(one.url)
        with pytest.raises(ServerError, match=said) as caught:
            server.model(5.0)
        server.close()
        assert one.url in str(caught.value) and caught.value.final is final
        assert caught.value.status == (
            answer[0] if isinstance(answer, tuple) and answer[0] != 200 else caught.value.status
        )


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=ipv6)])
def test_a_server_is_spoken_to_past_any_proxy(host, monkeypatch):
    for name, value in PROXY.items():
        monkeypatch.setenv(name, value)
    with Whoever(SGLANG, host) as one:
        server = Server(one.url)
        assert server.weight_version() == "unpublished" and server.alive()
        server.close()


def test_a_connection_that_is_refused_or_a_name_that_is_none_is_no_final_word():
    for url in ("http://127.0.0.1:9", "http://no-such-host.invalid:1", f"http://{'a' * 70}.test:1"):
        with pytest.raises(ServerError, match="down or not reachable") as caught:
            Server(url).model(5.0)
        assert caught.value.final is False and caught.value.status is None


def test_what_a_killed_server_left_in_shared_memory_goes_with_its_end_or_at_the_next_start(tmp_path):
    import mmap

    def file(name: str) -> Path:
        made = Path(f"/dev/shm/sglang_loads_test_{os.getpid()}_{name}.shm")
        made.write_bytes(bytes(4096))
        return made

    used, left, others = file("used"), file("left"), file("others")
    note = tmp_path / "server-1.shared"
    try:
        with used.open("r+b") as handle, mmap.mmap(handle.fileno(), 0):
            first = SharedFiles(note)
            first.see(os.getpgid(0))
            assert str(used) in note.read_text() and str(left) not in note.read_text()
            # A launcher that was killed; its server had these two, and one of them is somebody's still.
            note.write_text(f"{used}\n{left}\n/etc/hostname\n")
            SharedFiles(note).remove_left()
            assert used.exists() and not left.exists() and Path("/etc/hostname").exists() and not note.exists()
        first.remove()
        assert not used.exists() and others.exists()
    finally:
        for one in (used, left, others):
            one.unlink(missing_ok=True)
