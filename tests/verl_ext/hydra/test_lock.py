"""One process at a time writes into a run's folder."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from verl_ext.hydra import lock

HOLD = """
import sys, time
from verl_ext.hydra.lock import hold
held = hold(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_a_kill_frees_the_folder(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        for _ in range(2):
            with pytest.raises(ValueError) as error:
                lock.hold(tmp_path)
            for part in ("trainer.default_local_dir", str(tmp_path), f"process {other.pid} on {socket.gethostname()}"):
                assert part in str(error.value)
        other.send_signal(signal.SIGKILL)
        other.wait()
        lock.hold(tmp_path).release()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_this_process_cannot_take_it_twice_before_it_is_released(tmp_path):
    folder = tmp_path / "new" / "run"
    held = lock.hold(folder)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        lock.hold(folder)
    lock.hold(tmp_path / "other").release()
    held.release()
    lock.hold(str(folder)).release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\xff"])
def test_a_holder_that_did_not_write_its_name_is_another_process(tmp_path, content):
    held = lock.hold(tmp_path)
    (tmp_path / lock.HOLDER_FILE).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="is in use by another process"):
        lock.hold(tmp_path)
    held.release()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, error):
    def flock(*arguments):
        raise OSError(error, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    assert lock.hold(tmp_path) is None and lock.hold(tmp_path) is None
    assert f"warning: {tmp_path} cannot be locked" in capsys.readouterr().out
