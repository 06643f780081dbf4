"""Tests of downloads, against servers on loopback that fail in every way."""

import errno
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_files import HOPPER, bad_input, plain_loop, rows_of, same, write

from d4rl_tasks import TASKS, files, load_dataset
from d4rl_tasks import download as downloads

ROOT = Path(__file__).parents[1]


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` on loopback; each request is answered by the script's next word, and the last one repeats."""

    daemon_threads = True

    def __init__(self, content, *script):
        self.content, self.script, self.requests, self.lock = content, list(script) or ["whole"], [], threading.Lock()
        self.enough = threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/files/{HOPPER_FILE}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.enough.set()
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        with server.lock:
            word = server.script.pop(0) if len(server.script) > 1 else server.script[0]
            server.requests.append(word)
        content = server.other if word == "other" else server.content
        if word == "redirect":
            self.send_response(302)
            self.send_header("Location", server.url.replace("files", "elsewhere"))
            self.end_headers()
        elif word in ("404", "503"):
            self.send_error(int(word))
        elif word == "nonsense":
            self.wfile.write(b"\x00\xff" * 500)
        elif word == "portal":  # status 200, but a login page
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>")
        else:
            self.send_response(200)
            if word != "no length":
                self.send_header("Content-Length", "7 or 8" if word == "odd length" else str(len(content)))
            self.end_headers()
            if word == "slow":
                server.enough.wait(3)
            self.wfile.write(content[: len(content) // 2 if word in ("cut", "stall") else len(content)])
            self.wfile.flush()
            if word == "stall":
                server.enough.wait(60)


HOPPER_FILE = TASKS[HOPPER].url.rsplit("/", 1)[1]


@pytest.fixture
def content(tmp_path):
    return write(tmp_path / "source.hdf5", rows_of(3000)).read_bytes()


@pytest.fixture
def serve(content, tmp_path, monkeypatch):
    """serve(*script, mirror=..., **fields) starts D4RL's server and mirror on loopback; files go to tmp_path/data."""
    servers = []

    def start(*script, mirror=("404",), content=content, **fields):
        pair = Server(content, *script), Server(content, *mirror)
        servers.extend(pair)
        monkeypatch.setitem(TASKS, HOPPER, TASKS[HOPPER]._replace(url=pair[0].url, **fields))
        monkeypatch.setattr(downloads, "MIRROR", pair[1].url.removesuffix(HOPPER_FILE))
        # A busy machine answers late, so the timeout is short only in tests of a server that stops answering.
        monkeypatch.setattr(downloads, "TIMEOUT", (20.0, 3.0 if "stall" in script + tuple(mirror) else 60.0))
        return pair

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    yield start
    for server in servers:
        server.stop()


def left(tmp_path):
    """What a download leaves in the folder; the lock may stay."""
    return sorted(path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("script", [["whole"], ["redirect", "whole"], ["cut", "whole"], ["503", "whole"],
                                    ["no length"]])  # fmt: skip
def test_download_gets_the_file_through(serve, content, tmp_path, script, capsys):
    server, _ = serve(*script)
    same(load_dataset(HOPPER), plain_loop(rows_of(3000), 1000))
    assert (tmp_path / "data" / HOPPER_FILE).read_bytes() == content
    assert server.requests == script and left(tmp_path) == [HOPPER_FILE]
    told = capsys.readouterr().err
    assert (f"downloading {server.url}" in told and "100%" in told) or script == ["no length"]
    load_dataset(HOPPER)
    assert len(server.requests) == len(script)  # the file is there already


@pytest.mark.parametrize("script", [["404"], ["503"], ["portal"], ["nonsense"], ["odd length"], ["redirect"], ["cut"],
                                    ["stall"]])  # fmt: skip
def test_download_turns_to_the_mirror(serve, tmp_path, script):
    server, mirror = serve(*script, mirror=["whole"])
    start = time.monotonic()
    same(load_dataset(HOPPER), plain_loop(rows_of(3000), 1000))
    assert server.requests and mirror.requests == ["whole"] and time.monotonic() - start < 40


@pytest.mark.parametrize(("word", "reason"), [
    ("404", "404"), ("503", "503"), ("portal", "HDF5"), ("redirect", "redirects"), ("cut", "IncompleteRead"),
    ("stall", "timed out"), ("nonsense", "")
])  # fmt: skip
def test_download_that_fails_says_what_to_do(serve, tmp_path, word, reason):
    server, mirror = serve(word, mirror=[word])
    message = bad_input(lambda: load_dataset(HOPPER), reason, "--dataset-path", server.url, mirror.url)
    assert str(tmp_path / "data" / HOPPER_FILE) in message and left(tmp_path) == []
    hangs = word in ("stall", "nonsense")  # is not asked again
    assert word == "redirect" or len(server.requests) == len(mirror.requests) == (1 if hangs else 2)


def test_no_network_is_told_within_15_seconds(serve, capsys):
    server, mirror = serve()
    server.stop()
    mirror.stop()
    bad_input(lambda: load_dataset(HOPPER), "refused", "--dataset-path")
    told = capsys.readouterr().err
    assert told.splitlines() == [f"downloading {server.url}", f"downloading {mirror.url}"]  # and not again


def test_servers_that_nobody_reaches_are_given_up_soon(serve, monkeypatch):
    """Connections that are not accepted: a full queue drops them, as a firewall does."""
    _, mirror = serve()
    monkeypatch.setattr(downloads, "TIMEOUT", (2.0, 20.0))
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        url, full = "http://{}:{}/x".format(*deaf.getsockname()), []
        for _ in range(3):
            full.append(socket.socket())
            full[-1].setblocking(False)
            full[-1].connect_ex(deaf.getsockname())
        monkeypatch.setitem(TASKS, HOPPER, TASKS[HOPPER]._replace(url=url))
        mirror.stop()
        start = time.monotonic()
        bad_input(lambda: load_dataset(HOPPER), "timed out", url, "refused")
        assert time.monotonic() - start < 7
        for one in full:
            one.close()


def test_download_mixes_no_two_files(serve, content, tmp_path):
    """The server breaks off in the middle, and then has another file of the same length: that one is read, whole."""
    server, _ = serve("cut", "other")
    server.other = write(tmp_path / "other.hdf5", rows_of(3000, seed=1)).read_bytes()
    assert len(server.other) == len(content)
    same(load_dataset(HOPPER), plain_loop(rows_of(3000, seed=1), 1000))
    assert (tmp_path / "data" / HOPPER_FILE).read_bytes() == server.other


def test_download_checks_hash_and_contents(serve, tmp_path, content):
    true = hashlib.sha256(content).hexdigest()
    serve(sha256="0" * 64)
    bad_input(lambda: load_dataset(HOPPER), true, "0" * 64)
    serve(sha256="", content=write(tmp_path / "wide.hdf5", rows_of(3000, state_dim=12)).read_bytes())
    bad_input(lambda: load_dataset(HOPPER), "(3000, 12)")
    assert left(tmp_path) == []  # what is wrong is not kept
    serve(sha256=true)
    load_dataset(HOPPER)


def test_download_is_kept_where_memory_does_not_suffice_to_check_it(serve, content, tmp_path, monkeypatch):
    server, _ = serve("whole")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_checked", lambda *_: np.empty(2**62, np.uint8))  # numpy's own MemoryError
        bad_input(lambda: load_dataset(HOPPER), HOPPER, "memory")
    assert (tmp_path / "data" / HOPPER_FILE).read_bytes() == content
    load_dataset(HOPPER)
    assert server.requests == ["whole"]


def test_download_into_a_folder_that_cannot_be(serve, tmp_path, monkeypatch):
    serve()
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/deeper"):
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / folder))
        bad_input(lambda: load_dataset(HOPPER), "--dataset-path", str(tmp_path / folder))


def test_a_full_disk_is_told_and_leaves_nothing(serve, tmp_path, monkeypatch):
    serve()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    bad_input(lambda: load_dataset(HOPPER), "No space left", "--dataset-path")
    assert left(tmp_path) == []


def test_a_download_needs_no_temporary_folder(serve, monkeypatch):
    serve()
    monkeypatch.setattr(tempfile, "gettempdir", None)
    load_dataset(HOPPER)


def test_a_file_may_be_read_by_others(serve, tmp_path):
    """Data folders are shared: the file has the permissions of any new file."""
    serve()
    load_dataset(HOPPER)
    (tmp_path / "new").touch()
    assert (tmp_path / "data" / HOPPER_FILE).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_download_goes_to_d4rls_own_folder_by_default(serve, tmp_path, monkeypatch):
    serve()
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    load_dataset(HOPPER)
    assert (tmp_path / "home" / ".d4rl" / "datasets" / HOPPER_FILE).is_file()


def loading(server):
    """Starts another process, which loads the data from the same server once it is sent a line."""
    code = f"""
import d4rl_tasks, d4rl_tasks.download, h5py, pooch, requests
d4rl_tasks.TASKS["{HOPPER}"] = d4rl_tasks.TASKS["{HOPPER}"]._replace(url="{server.url}")
d4rl_tasks.download.MIRROR = "http://127.0.0.1:9/"
print("ready", flush=True)
input()
print(len(d4rl_tasks.load_dataset("{HOPPER}")["rewards"]))"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_download_at_once_do_no_harm(serve, content, tmp_path):
    server, _ = serve("slow")
    processes = [loading(server) for _ in range(3)]
    for process in processes:
        go(process)
    results = [process.communicate(timeout=300) for process in processes]
    assert [out.strip() for out, _ in results] == ["2997"] * 3, results
    assert server.requests == ["slow"] and sum("another process" in err for _, err in results) == 2
    assert (tmp_path / "data" / HOPPER_FILE).read_bytes() == content


def test_download_begins_again_after_a_process_was_killed(serve, content, tmp_path):
    server, _ = serve("stall", "whole")
    process, part = loading(server), tmp_path / "data" / (HOPPER_FILE + ".part")
    go(process)
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    load_dataset(HOPPER)  # neither lock nor part stands in the way
    assert (tmp_path / "data" / HOPPER_FILE).read_bytes() == content and left(tmp_path) == [HOPPER_FILE]
