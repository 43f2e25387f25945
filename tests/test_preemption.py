"""A stand-in for the metadata server of Google's machines: what it says is heard, and stops a run as SIGTERM does."""

import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from grpo_jax import hosts, loop, preemption
from grpo_jax.checkpoints import Checkpoints
from tests.test_loop import experience, run


class Server(ThreadingHTTPServer):
    """Answers at once where the question's ETag is not that of what it would say, else when that changes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.preempted, self.knows, self.asked, self.fails = threading.Event(), True, [], 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        query = {name: value for name, (value,) in parse_qs(url.query).items()}
        server.asked.append(query)
        if self.headers["Metadata-Flavor"] != "Google":
            return self.send_error(403)
        if not server.knows or url.path != "/computeMetadata/v1/instance/preempted":
            return self.send_error(404)
        if server.fails:
            server.fails -= 1
            return self.send_error(503)
        if query["wait_for_change"] == "true" and query["last_etag"] == "1":
            server.preempted.wait(float(query["timeout_sec"]))
        said = b"TRUE\n" if server.preempted.is_set() else b"FALSE\n"
        self.send_response(200)
        self.send_header("ETag", "2" if server.preempted.is_set() else "1")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        """Not on the standard error, where http.server would write each question."""


@pytest.fixture
def server(monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.delenv("NO_GCE_CHECK", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which knows no machine's own server
    monkeypatch.setattr(preemption, "_PAUSE", 0.01)
    preemption.notice.cache_clear()
    yield server
    preemption.notice.cache_clear()
    server.preempted.set()  # whoever waits is answered, and ends
    server.shutdown()
    server.server_close()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_notice_is_waited_for_and_not_asked_for_again_and_again(server, caplog):
    server.fails = 2
    came = preemption.notice()
    until(lambda: len(server.asked) == 4)  # two that fail, one that is answered at once, one that waits
    time.sleep(0.2)
    assert not came.is_set()
    assert len(server.asked) == 4
    assert [query["last_etag"] for query in server.asked] == ["0", "0", "0", "1"]
    server.preempted.set()
    assert came.wait(20)
    assert len(server.asked) == 4
    assert preemption.notice() is came
    failed, told = caplog.messages  # of two failures the first
    assert "cannot be asked about preemption, and will be again: HTTP Error 503" in failed
    assert told.endswith("says that this machine is being taken away.")


def test_where_a_server_does_not_know_of_it_it_is_asked_once(server, caplog):
    server.knows = False
    came = preemption.notice()
    until(lambda: caplog.messages)
    time.sleep(0.2)  # in which it might be asked again
    assert len(server.asked) == 1
    assert not came.is_set()
    (said,) = caplog.messages
    assert said.endswith("does not tell of preemption: of it SIGTERM alone will be heard.")


def test_no_other_machine_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.delenv("NO_GCE_CHECK", raising=False)
    asked = []
    monkeypatch.setattr(preemption, "_wait", lambda host, came: asked.append(host))
    for product, host in (("Standard PC\n", []), (None, []), ("Google Compute Engine\n", ["metadata.google.internal"])):
        monkeypatch.setattr(preemption, "_PRODUCT", tmp_path / str(product).strip())
        if product:
            preemption._PRODUCT.write_text(product)
        preemption.notice.cache_clear()
        preemption.notice()
        until(lambda host=host: asked == host)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    preemption.notice.cache_clear()
    preemption.notice()
    time.sleep(0.1)
    assert len(asked) == 1
    preemption.notice.cache_clear()


@pytest.mark.parametrize("follows", ["before it is looked at", "while it saves"])
def test_a_run_is_saved_and_sigterm_that_follows_kills_nothing(server, tmp_path, capsys, monkeypatch, follows):
    save = Checkpoints.save
    sigterm = lambda: os.kill(os.getpid(), signal.SIGTERM)

    def taken_away(state, journal, interrupt):
        if int(state.step) == 3:
            server.preempted.set()
            assert preemption.notice().wait(20)
            if follows == "before it is looked at":
                sigterm()
        return experience(state, journal, interrupt)

    def killed(self, state, *arguments, **options):
        if server.preempted.is_set() and follows == "while it saves":
            sigterm()
        save(self, state, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, 9, experience=taken_away)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "preempted: stopped after step 3" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps[-1] == 3
    preemption.notice.cache_clear()
    server.preempted.clear()
    resumed, _ = run(tmp_path, 9)
    straight, _ = run(tmp_path / "straight", 9)
    np.testing.assert_array_equal(resumed.params["w"], straight.params["w"])


def test_other_processes_hear_of_it(server, monkeypatch):
    said = []
    monkeypatch.setattr(hosts, "agreed", lambda value: said.append(value) or value)
    server.preempted.set()
    with loop.StopSignals() as stop:
        assert stop._notice.wait(20)
        with pytest.raises(loop.Stopped):
            stop.check()
    assert said == [signal.SIGTERM]
