#!/usr/bin/env python3
"""Runs the built suite natively, under QEMU TCG and under Lodger's engines, and prints what it takes.

Called by run.sh. Standard library only.

What is measured:
  rows    the rate of each row by the guest's own clock; the slowdown is the native rate over it. A
          row's checksum must be the same everywhere. The guest's clock is compared with the host's.
  boot    from the start of the monitor to the first line of the guest's first process
  memory  what the monitor uses beside the guest's RAM: its anonymous and shared memory without the
          mapping that is the RAM; once the guest has booted and again after the rows
  idle    CPU time of the monitor while the guest's only process sleeps
Repetitions go round robin, so that a slow spell of the host hits everyone; the tables show medians.
"""

import argparse
import json
import math
import os
import re
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
APPEND = "console=ttyS0 panic=-1 quiet"
PROBLEMS = []


def say(text):
    print(f"suite: {text}", file=sys.stderr, flush=True)


def problem(text):
    PROBLEMS.append(text)
    say(text)


def die(text):
    say(text)
    sys.exit(1)


def arguments():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    target = os.environ.get("CARGO_TARGET_DIR") or os.path.join(HERE, "../../target")
    p = argparse.ArgumentParser(
        prog="run.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--engines", default="interp,dbt", help="Lodger's engines, with commas (default: interp,dbt); '' for none")
    p.add_argument("--rows", help="groups or group/row, with commas (default: all)")
    p.add_argument("--quick", action="store_true", help="one repetition, 100 ms for a row")
    p.add_argument("--repeat", type=int, help="repetitions (default: 3)")
    p.add_argument("--ms", type=int, help="time for a row (default: 300)")
    p.add_argument("--idle", type=int, help="seconds of idleness (default: 5)")
    p.add_argument("--only", choices=["rows", "machine"], help="only the rows, or only boot, memory and idleness")
    p.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    p.add_argument("--lodger", default=os.path.join(target, "release/lodger"), help="the monitor (default: %(default)s)")
    p.add_argument(
        "--kernel",
        default=os.path.join(cache, "lodger/images/mini/vmlinuz"),
        help="a bzImage (default: that of the image mini, see `lodger image build mini`)",
    )
    p.add_argument("--memory", type=int, default=512, help="the guest's, in MiB (default: 512)")
    p.add_argument("--qemu", default="-machine q35 -cpu max,la57=off", help="QEMU's machine (default: %(default)s)")
    p.add_argument("--without-qemu", action="store_true", help="measure no peer")
    p.add_argument("--nice", type=int, default=0, help="niceness of all that is measured; root may ask for -20 on a busy host")
    p.add_argument("--timeout", type=int, default=900, help="seconds for one run (default: 900)")
    p.add_argument("--keep", metavar="DIR", help="keep consoles and the monitors' messages there")
    p.add_argument("--files", required=True, help=argparse.SUPPRESS)
    a = p.parse_args()
    a.repeat = a.repeat or (1 if a.quick else 3)
    a.ms = a.ms or (100 if a.quick else 300)
    a.idle = a.idle or (2 if a.quick else 5)
    return a


# ---- who is measured ---------------------------------------------------------


def kernel_elf(bzimage, out):
    """Unpacks the ELF file in a bzImage, which QEMU starts without the guest decompressing anything (PVH).

    Documentation/arch/x86/boot.rst, payload_offset; LZ4 as Debian's kernels have it. False if it cannot be done.
    """
    with open(bzimage, "rb") as f:
        data = f.read()
    if data[0x202:0x206] != b"HdrS" or not shutil.which("lz4"):
        offset, length = None, 0
    else:
        start = ((data[0x1F1] or 4) + 1) * 512
        offset, length = struct.unpack_from("<II", data, 0x248)
        data = data[start + offset : start + offset + length - 4]  # without the size that the linker added
    if offset is None or data[:4] != b"\x02\x21\x4c\x18":
        say("without tcg-pvh: wants a kernel compressed by LZ4, and lz4 (apt-get install lz4)")
        return False
    with open(out, "wb") as f:
        f.write(subprocess.run(["lz4", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout)
    return True


class Guests:
    """The monitors' command lines."""

    def __init__(self, a):
        self.a = a
        self.initrd = os.path.join(a.files, "initrd")
        self.engines = [e for e in a.engines.split(",") if e]
        self.peers = []
        self.elf = os.path.join(a.files, "vmlinux")
        if a.without_qemu:
            return
        if not shutil.which("qemu-system-x86_64"):
            say("without tcg: no qemu-system-x86_64: apt-get install qemu-system-x86")
            return
        self.peers = ["tcg"]
        if a.only != "rows" and kernel_elf(a.kernel, self.elf):
            self.peers.append("tcg-pvh")

    def rows(self):
        return [p for p in self.peers if p == "tcg"] + self.engines

    def machines(self):
        return self.peers + self.engines

    def command(self, name, suite_arguments):
        append = f"{APPEND} -- {' '.join(suite_arguments)}"
        if name in self.peers:
            kernel = self.elf if name == "tcg-pvh" else self.a.kernel
            return (
                ["qemu-system-x86_64", "-accel", "tcg", *self.a.qemu.split(), "-m", str(self.a.memory)]
                + ["-no-reboot", "-nodefaults", "-display", "none", "-serial", "stdio"]
                + ["-kernel", kernel, "-initrd", self.initrd, "-append", append]
            )
        return (
            [self.a.lodger, "run", "--engine", name, "--no-reboot", "--memory", f"{self.a.memory}M"]
            + ["--kernel", self.a.kernel, "--initrd", self.initrd, "--append", append]
        )


# ---- what the host knows of a process ----------------------------------------


def cpu_seconds(pid):
    """CPU time of a process's threads, which the scheduler counts in nanoseconds."""
    total = 0
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/schedstat") as f:
                total += int(f.read().split()[0])
    except OSError:
        pass  # a thread that has just ended
    return total / 1e9


def memory_mib(pid, ram_mib):
    """(what the process uses beside the guest's RAM, what it uses of the RAM), in MiB, from smaps."""
    areas = []  # [kB of address space, resident kB, anonymous kB, inode, path]
    with open(f"/proc/{pid}/smaps") as f:
        for line in f:
            head = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s*(.*)", line)
            if head:
                size = (int(head[2], 16) - int(head[1], 16)) // 1024
                areas.append([size, 0, 0, head[3], head[4]])
            elif line.startswith("Rss:"):
                areas[-1][1] = int(line.split()[1])
            elif line.startswith("Anonymous:"):
                areas[-1][2] = int(line.split()[1])
    ram_area = next((a for a in areas if a[0] == ram_mib * 1024), None)
    if ram_area is None:
        raise ValueError("no mapping has the size of the guest's RAM")
    ram, beside, shared = ram_area[1], 0, {}
    for area in areas:
        _, resident, anonymous, inode, path = area
        if area is ram_area or (inode != "0" and inode == ram_area[3]):
            continue
        beside += anonymous
        if path.startswith(("/memfd:", "/dev/shm/", "/dev/zero")):
            shared[inode] = max(shared.get(inode, 0), resident)  # mapped twice is there once
    return (beside + sum(shared.values())) / 1024, ram / 1024


# ---- one run -----------------------------------------------------------------


class Run:
    """One run of the suite: the lines it prints, with the host's time, and what was seen of the process meanwhile."""

    def __init__(self, a, name, command, log):
        self.a, self.name = a, name
        self.rows = {}  # name: (rate, unit, checksum)
        self.marks = {}  # the host's time of the last line of each kind
        self.kernel = ""
        self.boot = self.memory = self.ram_used = self.idle = self.guest_seconds = None
        self.complete = False
        if a.nice:
            command = ["nice", "-n", str(a.nice)] + command
        with open(log + ".console", "wb") as console, open(log + ".messages", "wb") as messages:
            self.start = time.monotonic()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages, start_new_session=True
            )
            try:
                self.group_niceness()
                self.follow(console)
            finally:
                self.end()
        if not self.complete:
            tail = b""
            for kind in (".console", ".messages"):
                with open(log + kind, "rb") as f:
                    tail += b"\n".join(f.read().splitlines()[-4:]) + b"\n"
            problem(f"{name} did not reach its end")
            print(tail.decode(errors="replace").strip(), file=sys.stderr)

    def group_niceness(self):
        """Where the scheduler groups processes by session, only the group's niceness counts against other sessions."""
        try:
            with open(f"/proc/{self.process.pid}/autogroup", "w") as f:
                f.write(str(self.a.nice))
        except OSError:
            pass  # no such grouping here

    def follow(self, console):
        deadline = self.start + self.a.timeout
        out, part = self.process.stdout.fileno(), b""
        while time.monotonic() < deadline:
            if not select.select([out], [], [], 1)[0]:
                continue
            data = os.read(out, 65536)
            if not data:
                return
            console.write(data)
            *lines, part = (part + data).split(b"\n")
            for line in lines:
                self.line(line.decode(errors="replace").strip())

    def cpu_time(self):
        """Of the monitor; of the rows' processes when they run natively."""
        if self.name != "native":
            return cpu_seconds(self.process.pid)
        with open(f"/proc/{self.process.pid}/stat") as f:
            user, system = f.read().rpartition(")")[2].split()[13:15]  # of children that have been waited for
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def end(self):
        """Waits for the process, kills it if it is not at its end."""
        give_up = time.monotonic() + (5 if self.complete else 0)
        while self.process.poll() is None:
            if time.monotonic() > give_up:
                os.killpg(self.process.pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.stdout.close()

    def line(self, line):
        mark = re.search(r"SUITE-([A-Z-]+) ?(.*)", line)
        if not mark:
            return
        kind, rest, now, pid = mark[1], mark[2].split(), time.monotonic(), self.process.pid
        self.marks[kind] = now
        if kind == "INIT":
            self.boot = now - self.start
            self.cpu_from = self.cpu_time()
        elif kind == "KERNEL":
            self.kernel = mark[2]
        elif kind == "ROW" and len(rest) == 5:
            name, rate, unit, checksum, _ = rest
            self.rows[name] = (float(rate), unit, checksum)
        elif kind in ("FAILED", "ERROR"):
            problem(f"{self.name}: {mark[2]}")
        elif kind == "ROWS-END":
            self.guest_seconds = float(rest[0])
            self.host_seconds = now - self.marks["INIT"]
            self.share = (self.cpu_time() - self.cpu_from) / self.host_seconds
        elif kind == "IDLE":
            if self.name != "native":
                try:
                    self.memory, self.ram_used = memory_mib(pid, self.a.memory)
                except (OSError, ValueError) as e:
                    problem(f"{self.name}: memory not measured: {e}")
            self.idle_from = cpu_seconds(pid)
        elif kind == "IDLE-END":
            self.idle = 100 * (cpu_seconds(pid) - self.idle_from) / (now - self.marks["IDLE"])
        elif kind == "END":
            self.complete = True


def measure_rows(a, guests, log):
    """{monitor: [Run]} with the suite's rows."""
    runs = {}
    options = ["--ms", str(a.ms)] + (["--rows", a.rows] if a.rows else [])
    scratch = tempfile.mkdtemp(dir="/dev/shm")
    try:
        for n in range(1, a.repeat + 1):
            for name in ["native"] + guests.rows():
                if name == "native":
                    command = [os.path.join(a.files, "init"), *options, "--dir", scratch]
                else:
                    command = guests.command(name, options + ["--idle", "1"])
                run = Run(a, name, command, f"{log}/{name}-rows-{n}")
                say(f"rows, {n} of {a.repeat}: {name}, {len(run.rows)} rows")
                runs.setdefault(name, []).append(run)
                if run.guest_seconds is None:
                    continue
                if run.share < 0.9:
                    say(f"  it got {run.share:.0%} of a CPU: the host is busy")
                if abs(run.guest_seconds - run.host_seconds) > 0.05 * run.host_seconds + 0.3:  # lines are read late on a busy host
                    problem(f"{name}: the rows took {run.guest_seconds:.1f} s by the guest's clock, {run.host_seconds:.1f} s by the host's")
    finally:
        shutil.rmtree(scratch)
    return runs


def measure_machines(a, guests, log):
    """{monitor: [Run]} without rows: boot, memory, idleness."""
    runs = {}
    for n in range(1, a.repeat + 1):
        for name in guests.machines():
            run = Run(a, name, guests.command(name, ["--rows", "none", "--idle", str(a.idle)]), f"{log}/{name}-machine-{n}")
            say(f"machine, {n} of {a.repeat}: {name}")
            runs.setdefault(name, []).append(run)
    return runs


# ---- what it means -------------------------------------------------------------


def median(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


def mean(values):
    """Geometric mean."""
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values else None


def summarize(row_runs, machine_runs):
    """Everything in one dictionary, which is the JSON output too."""
    rows = {}
    for name, runs in row_runs.items():
        for run in runs:
            for row, (rate, unit, checksum) in run.rows.items():
                entry = rows.setdefault(row, {"unit": unit, "checksum": checksum, "rates": {}})
                entry["rates"].setdefault(name, []).append(rate)
                if checksum != entry["checksum"]:
                    problem(f"{row}: checksum {checksum} under {name}, {entry['checksum']} before")
    for row in rows.values():
        row["median"] = {name: median(rates) for name, rates in row["rates"].items()}
        native = row["median"].get("native")
        row["slowdown"] = {n: native / rate for n, rate in row["median"].items() if native and n != "native"}
        tcg = row["slowdown"].get("tcg")
        row["faster_than_tcg"] = {n: tcg / s for n, s in row["slowdown"].items() if tcg and n != "tcg"}
    groups = {}
    for group in [*dict.fromkeys(row.split("/")[0] for row in rows), "all rows"]:
        members = [r for name, r in rows.items() if group in ("all rows", name.split("/")[0])]
        groups[group] = {"rows": len(members)}
        for what in ("slowdown", "faster_than_tcg"):
            names = dict.fromkeys(n for r in members for n in r[what])
            groups[group][what] = {n: mean([r[what][n] for r in members if n in r[what]]) for n in names}
    machines = {}
    for name in machine_runs or row_runs:
        booted, after = machine_runs.get(name, []), row_runs.get(name, [])
        machines[name] = {
            "boot_seconds": median(r.boot for r in booted),
            "memory_booted_mib": median(r.memory for r in booted),
            "ram_touched_booted_mib": median(r.ram_used for r in booted),
            "memory_after_rows_mib": median(r.memory for r in after),
            "idle_cpu_percent": median(r.idle for r in booted),
        }
    machines.pop("native", None)
    kernels = {name: runs[-1].kernel for name, runs in row_runs.items()}
    return {"rows": rows, "groups": groups, "machines": machines, "kernels": kernels}


# ---- tables ----------------------------------------------------------------------


def si(value):
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g} "


def figure(value, digits=3):
    """With so many digits that count, not in powers of ten."""
    if value is None:
        return "-"
    decimals = max(0, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(decimals, 3)}f}"


def label(name):
    return {"tcg": "QEMU TCG", "tcg-pvh": "QEMU TCG, PVH"}.get(name, f"Lodger {name}")


def print_rows(result, names):
    """The rows under each monitor, then the groups."""
    engines = [n for n in names if n != "tcg"] if "tcg" in names else []

    def line(title, native, entry):
        print(
            f"{title:<26}{native:>22}"
            + "".join(f"{figure(entry['slowdown'].get(n)):>10}" for n in names)
            + "".join(f"{figure(entry['faster_than_tcg'].get(n)):>12}" for n in engines)
        )

    head = f"{'slowdown over native':<26}{'native rate':>22}" + "".join(f"{n:>10}" for n in names)
    print(head + "".join(f"{'tcg/' + n:>12}" for n in engines))
    for group, total in result["groups"].items():
        for name, row in result["rows"].items():
            if name.split("/")[0] == group:
                native = row["median"].get("native")
                line("  " + name, f"{si(native)}{row['unit']}/s" if native else "-", row)
        line(f"{group} ({total['rows']})", "geometric mean", total)
    for n in engines:
        slower = [name for name, row in result["rows"].items() if row["faster_than_tcg"].get(n, 1) < 1]
        if slower:
            print(f"\nslower under {n} than under tcg: {', '.join(slower)}")


def print_markdown(result, names, description):
    engines = [n for n in names if n != "tcg"] if "tcg" in names else []

    def line(cells):
        print("| " + " | ".join(cells) + " |")

    if result["rows"]:
        line(
            ["slowdown over native, geometric means", "rows"]
            + [label(n) for n in names]
            + [f"{label(n)}: times faster than TCG" for n in engines]
        )
        line(["---"] * (2 + len(names) + len(engines)))
        for group, total in result["groups"].items():
            line(
                [group, str(total["rows"])]
                + [figure(total["slowdown"].get(n)) for n in names]
                + [figure(total["faster_than_tcg"].get(n)) for n in engines]
            )
        print()
    machines = {n: m for n, m in result["machines"].items() if any(v is not None for v in m.values())}
    if machines:
        line(["the whole machine"] + [label(n) for n in machines])
        line(["---"] * (1 + len(machines)))
        for key, title in (
            ("boot_seconds", "start to the first process's first line, s"),
            ("memory_booted_mib", "memory beside the guest's RAM, booted, MiB"),
            ("memory_after_rows_mib", "memory beside the guest's RAM, after the rows, MiB"),
            ("idle_cpu_percent", "idle guest, % of a CPU"),
        ):
            if any(m[key] is not None for m in machines.values()):
                line([title] + [figure(m[key], 2) for m in machines.values()])
        print()
    print(description)


def describe(a):
    with open("/proc/cpuinfo") as f:
        model = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "unknown processor")
        f.seek(0)
        where = ", a virtual machine" if re.search(r"^flags.*\bhypervisor\b", f.read(), re.M) else ""
    qemu = ""
    if shutil.which("qemu-system-x86_64") and not a.without_qemu:
        version = subprocess.run(["qemu-system-x86_64", "--version"], stdout=subprocess.PIPE, text=True).stdout
        qemu = f"; QEMU {version.split()[3]} (`{a.qemu}`)"
    u = os.uname()
    return f"Medians of {a.repeat}, {a.ms} ms a row, on {model}, {os.cpu_count()} CPUs{where}, Linux {u.release}{qemu}."


def check_rows(a):
    """Dies of a row that is not there, which the suite would pass over in silence."""
    listed = subprocess.run([os.path.join(a.files, "init"), "--list"], stdout=subprocess.PIPE, text=True, check=True)
    known = listed.stdout.split()
    for name in a.rows.split(",") if a.rows else []:
        if name not in known and not any(row.startswith(name + "/") for row in known):
            die(f"no row or group {name}; there are: {' '.join(known)}")


def main():
    a = arguments()
    for path, hint in ((a.kernel, "lodger image build mini, or --kernel FILE"), (a.lodger, "cargo build --release, or --lodger FILE")):
        if not os.access(path, os.R_OK):
            die(f"{path} is not there: {hint}")
    guests = Guests(a)
    log = a.keep or os.path.join(a.files, "logs")
    os.makedirs(log, exist_ok=True)
    check_rows(a)
    machine_runs = measure_machines(a, guests, log) if a.only != "rows" else {}
    row_runs = measure_rows(a, guests, log) if a.only != "machine" else {}

    result = summarize(row_runs, machine_runs)
    description = describe(a)
    names = guests.rows()
    if result["rows"]:
        for name, kernel in result["kernels"].items():
            print(f"{name}: {kernel}")
        print()
        print_rows(result, names)
        print()
    print_markdown(result, names, description)
    sys.stdout.flush()
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"description": description, **result, "problems": PROBLEMS}, f, indent=1)
            f.write("\n")
    if PROBLEMS:
        die(f"{len(PROBLEMS)} problems:\n  " + "\n  ".join(PROBLEMS))


if __name__ == "__main__":
    main()
