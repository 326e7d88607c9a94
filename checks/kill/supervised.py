"""Runs a program, stops it before each call that changes files, and continues or kills it.

A seccomp filter makes such calls wait for the supervisor's answer. So the supervisor counts calls over all
threads together, in the one order in which they happen. `strace --inject` counts them thread by thread, and
can never reach the second thread's third call.
"""
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct

# Number by architecture: x86_64, aarch64 (-1: there is none).
CALLS = {
    "open": (2, -1), "openat": (257, 56), "creat": (85, -1), "mkdir": (83, -1), "mkdirat": (258, 34),
    "write": (1, 64), "pwrite64": (18, 68), "writev": (20, 66), "pwritev": (296, 70), "pwritev2": (328, 287),
    "copy_file_range": (326, 285), "sendfile": (40, 71),
    "fallocate": (285, 47), "ftruncate": (77, 46), "truncate": (76, 45), "fsync": (74, 82), "fdatasync": (75, 83),
    "sync_file_range": (277, 84), "syncfs": (306, 267), "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, -1), "linkat": (265, 37), "symlink": (88, -1), "symlinkat": (266, 36), "unlink": (87, -1),
    "unlinkat": (263, 35), "rmdir": (84, -1), "flock": (73, 32),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
COLUMN, ARCHITECTURE, SECCOMP = MACHINES[platform.machine()]
NAMES = {numbers[COLUMN]: name for name, numbers in CALLS.items() if numbers[COLUMN] >= 0}

CREATES = os.O_CREAT | os.O_TRUNC
NO_NEW_PRIVS, SET_FILTER, NEW_LISTENER = 38, 1, 1 << 3
ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
RECEIVE, SEND, CONTINUE = 0xC0502100, 0xC0182101, 1
LIMIT_S = 60

libc = ctypes.CDLL(None, use_errno=True)


class Call:
    """A waiting call: its name, its path, and the new name if it gives one."""

    def __init__(self, notification):
        self.id, self.thread, _, number, *_ = struct.unpack_from("=QIIiIQ", notification)
        self.arguments = struct.unpack_from("=6Q", notification, 32)
        self.name = NAMES[number]
        self.path, self.to = "", ""
        a = self.arguments
        match self.name:
            case "open" | "creat" | "mkdir" | "unlink" | "rmdir" | "truncate":
                self.path = self.at(None, a[0])
            case "rename" | "link" | "symlink":
                self.path, self.to = self.at(None, a[0]), self.at(None, a[1])
            case "openat" | "mkdirat" | "unlinkat":
                self.path = self.at(a[0], a[1])
            case "renameat" | "renameat2" | "linkat":
                self.path, self.to = self.at(a[0], a[1]), self.at(a[2], a[3])
            case "symlinkat":
                self.path = self.at(a[1], a[2])
            case "copy_file_range":
                self.path = self.descriptor(a[2])
            case _:
                self.path = self.descriptor(a[0])

    def changes(self):
        """False for an open that only reads."""
        flags = {"open": 1, "openat": 2}.get(self.name)
        return flags is None or bool(self.arguments[flags] & CREATES)

    def descriptor(self, fd):
        try:
            return os.readlink(f"/proc/{self.thread}/fd/{fd & 0xFFFFFFFF}").removesuffix(" (deleted)")
        except OSError:
            return ""

    def at(self, fd, pointer):
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            memory.seek(pointer)
            # Up to the end of the page, then the next one: what follows the string may not be mapped.
            text = memory.read(4096 - pointer % 4096)
            if b"\0" not in text:
                text += memory.read(4096)
        path = os.fsdecode(text.split(b"\0")[0])
        here = ctypes.c_int32(fd & 0xFFFFFFFF).value if fd is not None else -100
        return path if path.startswith("/") or here == -100 else os.path.join(self.descriptor(here), path)


def listen():
    """Installs the filter in this process and returns the descriptor that announces its calls."""
    instructions = [(0x20, 0, 0, 4), (0x15, 1, 0, ARCHITECTURE), (0x06, 0, 0, ALLOW), (0x20, 0, 0, 0)]
    numbers = sorted(NAMES)
    instructions += [(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    instructions += [(0x06, 0, 0, ALLOW), (0x06, 0, 0, NOTIFY)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(buffer)))
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    listener = libc.syscall(SECCOMP, SET_FILTER, NEW_LISTENER, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def start(command, output, environment):
    """Starts the program with the filter on; returns its process id and the listener."""
    ours, its = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            socket.send_fds(its, [b"x"], [listen()])
            os.execve(command[0], command, environment)
        finally:
            os._exit(127)
    its.close()
    _, listeners, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    if not listeners:
        os.waitpid(child, 0)
        raise RuntimeError("no filter can be installed: seccomp with user notification is needed (Linux 5.5)")
    return child, listeners[0]


def run(command, decide, environment=os.environ):
    """Runs the program; `decide(call)` is asked before each changing call, and True kills the program in place of it.

    Gives the exit status (negative: the signal) and what it printed.
    """
    with open(os.memfd_create("output"), "w+b") as output:
        child, listener = start(command, output.fileno(), environment)
        try:
            serve(child, listener, decide)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            os.close(listener)
            _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode(errors="replace")


def serve(child, listener, decide):
    """Answers until the program has ended or was killed."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        ready = poll.poll(LIMIT_S * 1000)
        if not ready:
            raise RuntimeError(f"neither an end nor a call within {LIMIT_S} s")
        if not ready[0][1] & select.POLLIN:
            return
        notification = bytearray(80)
        try:
            fcntl.ioctl(listener, RECEIVE, notification)
            call = Call(notification)
            if call.changes() and decide(call):
                os.kill(child, signal.SIGKILL)
                return
            fcntl.ioctl(listener, SEND, struct.pack("=QqiI", call.id, 0, 0, CONTINUE))
        except OSError as error:
            # The calling thread has ended.
            if error.errno not in (errno.ENOENT, errno.ESRCH):
                raise
