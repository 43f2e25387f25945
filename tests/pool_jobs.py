"""What workers run in the tests of the pool, and the names say what it does to them."""

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time


def length(*, completion, **_):
    return len(completion)


def pid(**_):
    time.sleep(0.01)  # so that no worker takes all
    return os.getpid()


def surroundings(*, name, **_):
    """1 where it is there."""
    return float(name in sys.modules or name in os.environ)


def spin(**_):
    while True:
        pass


def hold(**_):
    """Forever in one call that lets no other thread run."""
    return 9**9**9


def burn(*, seconds, **_):
    """So much CPU time, and then says how much."""
    started = time.process_time()
    while time.process_time() - started < seconds:
        pass
    return time.process_time() - started


def sleep(*, seconds, **_):
    time.sleep(seconds)
    return 1.0


def busy(*, how, **_):
    """Says who is there, with a process of its own, and goes on for ever."""
    child = subprocess.Popen(["sleep", "1000"])
    print("busy", os.getpid(), child.pid)
    {"sleep": lambda: time.sleep(1000), "hold": hold, "spin": spin}[how]()


def scatter(*, then, **_):
    """Leaves files, and processes in sessions of their own, of which one has lost its parent; says which."""
    descriptor, path = tempfile.mkstemp()
    os.close(descriptor)
    away = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    script = "import subprocess; print(subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=2).pid)"
    orphan = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout
    print("scattered", path, away.pid, int(orphan), flush=True)
    return {"return": lambda: 1.0, "end": lambda: os._exit(3), "hold": hold}[then]()


def nest(*, levels, **_):
    """Leaves directories in one another, the innermost closed, and goes on for ever."""
    os.chdir(tempfile.mkdtemp())
    for _ in range(levels):
        os.mkdir("x")
        os.chdir("x")
    os.chmod(".", 0)
    hold()


def fork(*, completion, then, **_):
    """0, but the child of `fork` comes back with another answer, an exception or too little memory."""
    if completion == "fork":
        if not os.fork():
            return {"return": lambda: 1.0, "raise": lambda: {}["no"], "eat": lambda: eat(mib=1000)}[then]()
        os.wait()
    return 0.0


def end_group(*, completion, **_):
    """Ends all that it takes for its own, after it has left a file, and a process that says who it is."""
    if completion == "end":
        print("left", subprocess.Popen(["sleep", "1000"], start_new_session=True).pid, flush=True)
        os.close(tempfile.mkstemp()[0])
        os.killpg(0, signal.SIGKILL)
    return 0.0


def interject(*, completion, **_):
    """Writes what it was given where replies go."""
    for name in os.listdir("/proc/self/fd") if completion else ():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.write(int(name), completion.encode() + b"\n")
                break
    return 0.0


def leave_or_not(*, completion, **_):
    if completion:
        os._exit(3)
    return 0.0


def stop_supervisor(**_):
    os.kill(os.getppid(), signal.SIGSTOP)
    subprocess.Popen(["sleep", "1000"])
    return float(os.getpid())


def eat(*, mib, **_):
    kept = []
    for _ in range(mib):
        kept.append(bytearray(2**20))
    return len(kept)


_BEFORE = []


def remember(*, alone, **_):
    """How many items this worker has judged before; one that must be `alone` ends a worker that has."""
    if alone and _BEFORE:
        os._exit(3)
    _BEFORE.append(alone)
    return len(_BEFORE) - 1.0


def leave(*, how, **_):
    return {"exit": sys.exit, "_exit": lambda: os._exit(3), "crash": lambda: ctypes.string_at(0)}[how]()


def talk(*, completion, **_):
    print('{"item": 7.0, "seconds": 0.0}')
    os.write(1, b"noise\n")
    return [(0, float(completion == "x")), (1, float(sys.stdin.read() == ""))]


def fault(*, number, place, hangs, doomed, **_):
    """`number`, but that it hangs, or ends its worker at the first or at the second attempt."""
    attempts = pathlib.Path(place) / str(number)
    with attempts.open("a") as file:
        file.write("x")
    if hangs:
        spin()
    if doomed[len(attempts.read_text()) - 1]:
        os._exit(1)
    return number


def meet(*, place, name, other, **_):
    """Waits for the other: only at the same time do both end."""
    (pathlib.Path(place) / name).touch()
    while not (pathlib.Path(place) / other).exists():
        time.sleep(0.01)
    return 1.0


def stop(*, place, **_):
    """Says who it is, waits to be stopped, and then computes for 0.2 s."""
    (pathlib.Path(place) / "pid").write_text(str(os.getpid()))
    while not (pathlib.Path(place) / "go").exists():
        time.sleep(0.01)
    return burn(seconds=0.2)


def wrong(*, what, **_):
    return {"raise": lambda: {}["no"], "text": lambda: "2", "object": object, "nan": lambda: float("nan")}[what]()
