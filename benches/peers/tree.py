"""The CPU time and memory of a process and its descendants, from /proc."""
import os
import pathlib
import resource

TICK = os.sysconf("SC_CLK_TCK")


def descendants(pid):
    """Every process below this one, by the parents that /proc names: not every kernel lists children."""
    below = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # a process that has just ended
        below.setdefault(parent, []).append(int(stat.parent.name))
    found = list(below.get(pid, []))
    for child in found:
        found += below.get(child, [])
    return found


def seconds(pid):
    """CPU time of a live process of ours, including its dead and reaped children; in ticks of mostly 10 ms."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICK


def memory(pid, *names):
    """Fields of /proc/PID/status in bytes."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return [int(values.get(name, "0").split()[0]) * 1024 for name in names]


class Use:
    """CPU time and peak memory of this process and its descendants."""

    def __init__(self):
        """Counts memory from here on, so that what a system keeps from one save to the next is included."""
        self.resident = memory(os.getpid(), "VmRSS")[0]

    def begin(self):
        """Counts CPU time, and a new peak, from here on."""
        self.peaks = True
        for pid in [os.getpid(), *descendants(os.getpid())]:
            try:
                pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")
            except OSError:
                self.peaks = False  # this kernel cannot reset peaks
        self.cpu = self.total()

    def total(self):
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = resource.getrusage(resource.RUSAGE_SELF)
        live = sum(seconds(pid) for pid in descendants(os.getpid()))
        return live + sum(use.ru_utime + use.ru_stime for use in (own, ended))

    def seconds(self):
        return self.total() - self.cpu

    def peak(self):
        """The sum of every process's own peak, so at most too high. Shared memory counts in the process that shared it. None
        where the kernel does not report peaks."""
        if not self.peaks:
            return None
        grown = memory(os.getpid(), "VmHWM")[0] - self.resident
        for pid in descendants(os.getpid()):
            peak, shared, files = memory(pid, "VmHWM", "RssShmem", "RssFile")
            grown += max(0, peak - shared - files)
        return grown
