"""The inside of the sandbox: a fresh interpreter runs this file and locks itself in.

Then it forks a child for each program. The locks, none of which needs root, a container or a
namespace; they hold for root as for an ordinary user:
    capabilities    dropped, with no_new_privs: nothing run later can have more
    Landlock        files: read the standard library and system libraries, write one flat folder; no
                    /proc, no home
    seccomp         a list of allowed system calls: no process, no exec, no socket, no file sent to
                    others, no signal to others, no ptrace, no chmod, no removal; threads are
                    allowed
    rlimits         memory, CPU time, size and number of files
    not dumpable    neither the server nor a child lets others open what it holds by /proc/<pid>/fd
What they leave: names, sizes and times of files whose path is guessed (stat is not Landlock's), and
the kernel's bugs. Where the kernel has no Landlock, a weaker jail may stand in its place: a root of
its own, by a namespace of mounts, or a user of its own; without the other layers there is none.

A child is forked from a process that has never held anything of a job: programs, arguments and
results go through pipes between child and parent (data/verify/sandbox.py), so a child can find no
other run and no expected value in its memory. Tests run in children of a server of their own, whose
Landlock domain no program shares. It uses only the standard library of the interpreter that it runs
in, and nothing of the project.
"""
import atexit
import builtins
import collections
import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import linecache
import os
import platform
import random
import resource
import signal
import socket
import struct
import sys
import threading
import traceback
import types

# Imported once, not by each program: a fork shares them.
for _name in ("bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools",
              "heapq", "itertools", "math", "operator", "re", "statistics", "string", "typing"):
    __import__(_name)

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel lacks a layer."""


# --------------------------------------------------------------------------------------------------
# The locks of the whole process

def lock(folder: str, readable: list[str], weak: bool) -> str:
    """Capabilities, Landlock and the rlimits that are the same for all jobs.

    Returns "", or what stands in Landlock's place (weak only).
    """
    limit(CORE=0, MEMLOCK=0, MSGQUEUE=0, STACK=64 << 20)
    lacking = _no_landlock()
    if lacking and not weak:
        raise Refused(lacking)
    instead = ""
    if lacking:
        instead = f"{lacking}; in its place {_hide_files(folder, readable)}"
    _drop_privileges()
    if not lacking:
        _landlock(folder, readable)
    _try_seccomp()
    return instead


def limit(**most: int):
    for what, value in most.items():
        number = getattr(resource, f"RLIMIT_{what}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def _drop_privileges():
    with contextlib.suppress(PermissionError):
        os.setgroups([])
    for capability in range(64):  # of the bounding set; an ordinary user may not, and has none
        libc.prctl(24, capability, 0, 0, 0)
    header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    if libc.prctl(38, 1, 0, 0, 0) or libc.capset(header, none):
        raise Refused("no_new_privs or capset failed")


READ_FILE, READ_DIR = 1 << 2, 1 << 3
WRITE_FILE, MAKE_REG, TRUNCATE = 1 << 1, 1 << 8, 1 << 14
# no removal: what is held open without a name could not be counted
FOLDER = WRITE_FILE | READ_FILE | READ_DIR | MAKE_REG | TRUNCATE


def _no_landlock() -> str:
    """Why this kernel has no Landlock; "" if it has."""
    if libc.syscall(444, None, 0, 1) >= 1:
        return ""
    reasons = {
        errno.ENOSYS: "it is older than Linux 5.13, built without CONFIG_SECURITY_LANDLOCK, or no "
                      "Linux (gVisor, WSL 1)",
        errno.EOPNOTSUPP: "it is built in and not switched on: boot with lsm=landlock,…",
        errno.EPERM: "this container's own filter forbids it",
    }
    code = ctypes.get_errno()
    return f"the kernel has no Landlock ({reasons.get(code, os.strerror(code))})"


def _landlock(folder: str, readable: list[str]):
    """Whatever is not named here can be neither read nor written.

    linux/landlock.h; since Linux 5.13.
    """
    version = libc.syscall(444, None, 0, 1)
    files = (1 << (13, 13, 14, 15, 15, 16)[min(version, 5)]) - 1
    # with TCP since version 4, abstract sockets and signals since 6
    attributes = struct.pack("<QQQ", files, 3, 3)
    if version < 4:
        attributes = attributes[:8]
    elif version < 6:
        attributes = attributes[:16]
    ruleset = libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0)
    rules = [(path, READ_FILE | READ_DIR) for path in readable]
    rules += [(folder, FOLDER), ("/dev/null", READ_FILE | WRITE_FILE)]
    for path, rights in rules:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this system
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE
        rule = struct.pack("<Qi", rights & files, fd)
        if libc.syscall(445, ruleset, 1, rule, 0):
            raise Refused(f"Landlock takes no rule for {path}")
        os.close(fd)
    if ruleset < 0 or libc.syscall(446, ruleset, 0):
        raise Refused(f"Landlock: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


# --------------------------------------------------------------------------------------------------
# In Landlock's place: less of the files can be seen

NEWNS, NEWUSER = 0x20000, 0x10000000                            # of unshare(2)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = (  # of mount(2)
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18)
PLACES = ("/mnt", "/media", "/srv", "/var/tmp", "/tmp")         # for the new root
OWN_USERS = range((1 << 31) - (1 << 22), (1 << 31) - 1)         # that nobody else has


def _hide_files(folder: str, readable: list[str]) -> str:
    """Takes the files away that a program has no business with; says how, and what is left.

    Tried in a child first: half of it cannot be undone.
    """
    user = OWN_USERS[os.getpid() % len(OWN_USERS)]
    ways = (
        ("a root of its own, by a namespace of mounts", lambda: _own_root(folder, readable)),
        ("a user of its own, who sees what every user may see and writes where every user may "
         "write", lambda: _own_user(folder, user)),
    )
    for says, hide in ways:
        if (pid := os.fork()) == 0:
            try:
                hide()
                trial = os.path.join(folder, "trial")
                with open(os.__file__), open(trial, "w"):
                    os.remove(trial)
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            hide()
            return says
    raise Refused(f"{_no_landlock()}. In a weaker jail it would have a root of its own (by a "
                  "namespace of mounts) or a user of its own (as root, with a Python that every "
                  "user may read): this machine gives neither")


def _own_root(folder: str, readable: list[str]):
    """A namespace of mounts with a root that holds what is readable, and the folder."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NEWNS):
        if libc.unshare(NEWNS | NEWUSER):
            raise Refused("no namespaces")
        libc.prctl(4, 1, 0, 0, 0)   # these files are root's while we are not dumpable
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                           ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as f:
                f.write(text)
        libc.prctl(4, 0, 0, 0, 0)
    _mount("none", "/", REC | PRIVATE)
    paths = {path: os.path.realpath(path) for path in (folder, "/dev/null", *readable)
             if os.path.exists(path)}
    bound = []
    for real in sorted({*paths.values()}):  # what lies in another comes after it, and with it
        if not bound or not real.startswith(bound[-1] + "/"):
            bound.append(real)

    def is_free(place: str) -> bool:
        return os.path.isdir(place) and not any(real.startswith(place + "/") for real in bound)

    root = next(filter(is_free, PLACES))
    _mount("tmpfs", root, NOSUID | NODEV, "tmpfs")
    for real in bound:
        _bind(real, root + real, writable=real in (paths[folder], "/dev/null"))
    for path, real in paths.items():
        if real != path and not os.path.lexists(root + path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(real, root + path)
    _mount("none", root, REMOUNT | RDONLY | NOSUID | NODEV)
    os.chroot(root)
    os.chdir("/")


def _bind(real: str, target: str, writable: bool):
    """Shows a file or folder at another place, too."""
    if os.path.isdir(real):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "x").close()
    _mount(real, target, BIND | REC)
    if not writable:  # the flags that it has must stay: some are locked
        kept = os.statvfs(target).f_flag & (NOSUID | NODEV | NOEXEC)
        _mount("none", target, BIND | REMOUNT | RDONLY | kept)


def _mount(source: str, target: str, flags: int, kind: str | None = None):
    kind = kind and kind.encode()
    if libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), None):
        raise Refused(f"mount {target}: {os.strerror(ctypes.get_errno())}")


def _own_user(folder: str, user: int):
    """A user that no other process has; only root can become one."""
    os.chown(folder, user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    libc.prctl(4, 0, 0, 0, 0)   # not dumpable, which another user is at first


def readable_paths(more: list[str]) -> list[str]:
    """What a program may read.

    The standard library without installed packages, shared libraries, time zones.
    """
    library = os.path.dirname(os.__file__)
    entries = [os.path.join(library, name) for name in os.listdir(library)
               if name not in ("site-packages", "dist-packages", "test")]
    shared = os.path.join(sys.base_prefix, "lib")
    entries += [os.path.join(shared, name) for name in os.listdir(shared) if ".so" in name]
    return entries + ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache",
                      "/dev/urandom", "/usr/share/zoneinfo", *more]


# --------------------------------------------------------------------------------------------------
# Seccomp: the system calls of a child (seccomp(2))

def _read_numbers(table: str) -> dict[str, tuple[int | None, int | None]]:
    """The two numbers of each call "name:x86_64:aarch64"; None for "-": there is no such call."""
    numbers = {}
    for entry in table.split():
        name, *both = entry.split(":")
        numbers[name] = tuple(None if number == "-" else int(number) for number in both)
    return numbers


ALLOWED = _read_numbers("""
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 lseek:8:62 close:3:57
close_range:436:436 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73
select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
epoll_wait:232:- epoll_pwait:281:22 eventfd2:290:19 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79
statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:- readlinkat:267:78
getcwd:79:17 getdents64:217:61 ftruncate:77:46 umask:95:166 fsync:74:82 fdatasync:75:83 flock:73:32
sendfile:40:71 copy_file_range:326:285 fadvise64:221:223 mmap:9:222 munmap:11:215 mprotect:10:226
mremap:25:216 madvise:28:233 brk:12:214 mincore:27:232 rt_sigaction:13:134 rt_sigprocmask:14:135
rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133
sigaltstack:131:132 pause:34:- alarm:37:- setitimer:38:103 getitimer:36:102 restart_syscall:219:128
nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
gettimeofday:96:169 time:201:- times:100:153 getrusage:98:165 sysinfo:99:179 uname:63:160
getrandom:318:278 getpid:39:172 gettid:186:178 getppid:110:173 getpgrp:111:- getpgid:121:155
getsid:124:156 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148
getresgid:120:150 getgroups:115:158 getrlimit:97:163 setrlimit:160:164 sched_yield:24:124
sched_getaffinity:204:123 getcpu:309:168 futex:202:98 set_robust_list:273:99 get_robust_list:274:100
set_tid_address:218:96 rseq:334:293 membarrier:324:283 arch_prctl:158:- exit:60:93 exit_group:231:94
wait4:61:260 waitid:247:95 sendto:44:206 recvfrom:45:207
shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209 setsockopt:54:208
""")
# name: (x86_64, aarch64), which argument, and what it may be: one of these values, or "self", the
# child's own number
CHECKED = {
    "kill": ((62, 129), 0, ["self"]),
    "tgkill": ((234, 131), 0, ["self"]),
    "prlimit64": ((302, 261), 0, [0, "self"]),
    # none that names who gets a signal
    "fcntl": ((72, 25), 1, [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032]),
    # is it a terminal, FIONBIO, …
    "ioctl": ((16, 29), 1, [0x5401, 0x5413, 0x5421, 0x5450, 0x5451, 0x541B]),
    # the name of a thread
    "prctl": ((157, 167), 0, [15, 16]),
}
# what clone must be told to make a thread: CLONE_VM, FILES, SIGHAND and THREAD. With a table of
# files of its own, each thread could hold as many as a process may
THREAD = 0x100 | 0x400 | 0x800 | 0x10000
NAMELESS = 0x400000     # of open, in O_TMPFILE
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
EPERM, ENOSYS, ALLOW, KILL = 0x50001, 0x50026, 0x7FFF0000, 0x80000000
LOAD, JUMP_EQ, JUMP_SET, AND, RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
# a line of BPF: what to do, the lines to skip if true and if false, and an operand
PERMIT, REFUSE = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)


def seccomp_filter(pid: int) -> bytes:
    """The filter as a BPF program; what is not allowed fails with EPERM."""
    column, architecture = ARCHITECTURES[platform.machine()]
    program = [
        (LOAD, 0, 0, 4),
        (JUMP_EQ, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
    ]

    def call(numbers: tuple, *body: tuple):
        if numbers[column] is not None:
            program.extend([(JUMP_EQ, 0, len(body), numbers[column]), *body])

    def argument(i: int) -> tuple:
        return LOAD, 0, 0, 16 + 8 * i  # its low half: these are all 32 bits wide

    for numbers in ALLOWED.values():
        call(numbers, PERMIT)
    for numbers, which, values in CHECKED.values():
        tests = []
        for value in values:
            tests += [(JUMP_EQ, 0, 1, pid if value == "self" else value), PERMIT]
        call(numbers, argument(which), *tests, REFUSE)
    call((56, 220), argument(0), (AND, 0, 0, THREAD), (JUMP_EQ, 0, 1, THREAD), PERMIT, REFUSE)
    call((435, 435), (RETURN, 0, 0, ENOSYS))    # clone3 hides its flags in memory: libc takes clone
    call((437, 437), (RETURN, 0, 0, ENOSYS))    # openat2 likewise
    # asyncio needs a socket pair; only a stream, since a datagram could be sent elsewhere
    call((53, 199),
         argument(0), (JUMP_EQ, 1, 0, 1), REFUSE,
         argument(1), (AND, 0, 0, 0xF), (JUMP_EQ, 0, 1, 1), PERMIT,
         REFUSE)
    # no file without a name; and O_TRUNC only on a file that is opened for writing: before its
    # version 3 Landlock sees no other
    for numbers, which in (((2, None), 1), ((257, 56), 2)):
        call(numbers,
             argument(which),
             (JUMP_SET, 0, 1, NAMELESS), REFUSE,
             (JUMP_SET, 1, 0, os.O_TRUNC), PERMIT,
             (AND, 0, 0, 3), (JUMP_EQ, 2, 0, os.O_WRONLY), (JUMP_EQ, 1, 0, os.O_RDWR), REFUSE,
             PERMIT)
    program.append(REFUSE)
    return b"".join(struct.pack("<HBBI", *line) for line in program)


def install(program: bytes):
    """Puts a filter on this thread; OSError where the kernel has none."""
    lines = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(lines))
    if libc.prctl(22, 2, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _try_seccomp():
    """Whether children will be able to install theirs, tried in one."""
    if platform.machine() not in ARCHITECTURES:
        raise Refused(f"no list of system calls for {platform.machine()}")
    if (pid := os.fork()) == 0:
        try:
            install(seccomp_filter(os.getpid()))
            os.fork()  # must fail
        except OSError as error:
            os._exit(0 if error.strerror != "seccomp" else 1)
        os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise Refused("the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER; WSL 1 has none), "
                      "without which there is no weaker jail either")


# --------------------------------------------------------------------------------------------------
# The server: forks a child for each request of the parent, and says how it ended

def main():
    libc.prctl(4, 0, 0, 0, 0)   # not dumpable, before it holds anything; children inherit it
    control = socket.socket(fileno=int(sys.argv[1]))
    folder, weak, paths = sys.argv[2], sys.argv[3] == "weak", sys.argv[4:]
    try:
        instead = lock(folder, readable_paths(paths), weak)
    except Refused as error:
        return control.send(json.dumps({"refused": str(error)}).encode())
    sys.path.extend(paths)
    control.send(json.dumps({"instead": instead}).encode())
    gc.freeze()
    while message := socket.recv_fds(control, 4096, 16):
        data, fds = message[:2]
        if not data:
            return  # the parent is gone
        request = json.loads(data)
        if "reap" in request:
            _, status, usage = os.wait4(request["reap"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status),
                      "seconds": usage.ru_utime + usage.ru_stime}
            pidfd = []
        else:
            server = os.getpid()
            try:
                pid = os.fork()
            except OSError as error:
                pid, answer, pidfd = None, {"failed": str(error)}, []
            if pid == 0:
                child(request, fds, server, folder)
            if pid:
                answer, pidfd = {"pid": pid}, [os.pidfd_open(pid)]
        socket.send_fds(control, [json.dumps(answer).encode()], pidfd)
        for fd in [*fds, *pidfd]:
            os.close(fd)


def child(request: dict, fds: list[int], server: int, folder: str):
    """One job, in a process of its own, from which it never returns."""
    code = 1
    try:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # dies with the server
        if os.getppid() != server:
            os._exit(1)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 40) for fd in fds]
        for fd, number in zip(high, request["numbers"]):
            os.dup2(fd, number)
        close_from(len(fds))
        # NOFILE not in the server: files that it sends are counted against it, with those that any
        # process of the user has sent
        limit(AS=request["memory"], CPU=request["cpu"], FSIZE=request["file_size"], NOFILE=64)
        os.unlink = os.remove = remove
        os.chdir(folder)
        install(seccomp_filter(os.getpid()))
        sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, encoding="utf-8", errors="replace")
                                             for fd, mode in enumerate("rww"))
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        sys.argv = ["program.py"]
        random.seed(0)  # the same verdict each time
        code = {"run": run, "serve": serve, "test": test}[request["kind"]](request)
    except SystemExit as leave:  # as Python does: a text is an error message
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if leave.code is not None and not isinstance(leave.code, int):
            print(leave.code, file=sys.stderr)
    except BaseException as error:
        ours = child.__code__.co_filename       # our own lines are of no interest
        while (trace := error.__traceback__) and trace.tb_frame.f_code.co_filename == ours:
            error.__traceback__ = trace.tb_next
        traceback.print_exception(error)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def close_from(first: int):
    if libc.syscall(436, first, ctypes.c_uint(0xFFFFFFFF), 0):
        os.closerange(first, 1 << 16)   # no close_range(2): before Linux 5.9


def remove(path, *, dir_fd=None):
    """Stands for os.remove: the file is emptied, its name stays, and counts as one of `files`."""
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC, dir_fd=dir_fd))


def read_source() -> str:
    with open(3, encoding="utf-8", errors="replace") as f:
        return f.read()


def namespace(name: str, source: str) -> dict:
    """Of a module that becomes sys.modules[name], whose source tracebacks can show."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    linecache.cache[f"{name}.py"] = len(source), None, source.splitlines(True), f"{name}.py"
    return vars(module)


def execute(source: str, space: dict):
    name = space["__name__"]
    exec(compile(source, f"{name}.py", "exec", dont_inherit=True), space)


def run(request: dict) -> int:
    """A script: its standard input is fd 0, its source fd 3."""
    source = read_source()
    space = namespace("__main__", source)
    try:
        execute(source, space)
    finally:
        # as Python does at a script's end: wait for threads, then call what was registered
        threading._shutdown()
        atexit._run_exitfuncs()
    return 0


# --------------------------------------------------------------------------------------------------
# Functions of a program, called through pipes. What travels is plain data, rebuilt on the other
# side from builtin types alone: an object that lies about itself is only its value there. Anything
# else stays where it is, under a number.

MOST_ALIKE = 100     # keys of a set or dictionary with the same hash
PLAIN = {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
ITERATED = (range, type({}.keys()), type({}.values()))      # they travel as iterators


class Raised(Exception):
    """A call raised this: type is the name of the exception's type."""

    def __init__(self, type: str, text: str):
        super().__init__(f"{type}: {text}")
        self.type, self.text = type, text


def encode(value: object, handle=None) -> object:
    """Plain data as JSON; handle(object) -> number is asked for the rest (TypeError without it)."""
    return _encode(value, handle)


def _encode(value: object, handle) -> object:
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        value = int.__int__(value)
        if abs(value) < 1 << 53:
            return value
        return {"int": hex(value)}      # Python limits the digits of decimals
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        kind = "bytearray" if isinstance(value, bytearray) else "bytes"
        return {kind: bytes(value).hex()}
    if isinstance(value, list):
        return [_encode(v, handle) for v in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[_encode(k, handle), _encode(v, handle)] for k, v in dict.items(value)]}
    for name in ("tuple", "set", "frozenset"):
        if isinstance(value, PLAIN[name]):
            return {name: [_encode(v, handle) for v in PLAIN[name].__iter__(value)]}
    return _encode_object(value, handle)


def _encode_object(value: object, handle) -> object:
    """What is no plain data, but may be an iterator of such."""
    if handle is None:
        raise TypeError(f"{type(value).__name__} is no plain data")
    if hasattr(type(value), "__next__") or isinstance(value, ITERATED):
        return {"iterator": [_encode(v, handle) for v in value]}
    return {"object": handle(value)}


def decode(value: object, proxy=None) -> object:
    """What encode made, of builtin types alone; proxy(number) stands for what is no plain data.

    Raises ValueError and the like for what is malformed, and Raised.
    """
    if type(value) is list:
        return [decode(v, proxy) for v in value]
    if type(value) is not dict:
        return value
    (kind, content), = value.items()
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(content)
    if kind == "dict":
        keys = check_hashes([decode(key, proxy) for key, _ in content])
        return dict(zip(keys, [decode(each, proxy) for _, each in content]))
    if kind == "object" and proxy and type(content) is int:
        return proxy(content)
    if kind == "raised":
        raise Raised(*map(str, content))
    if kind not in PLAIN:
        raise ValueError(f"unknown kind {kind!r}")
    values = [decode(v, proxy) for v in content]
    return PLAIN[kind](check_hashes(values) if kind in ("set", "frozenset") else values)


def check_hashes(keys: list) -> list:
    """The keys. ValueError where many have one hash: a set of n such would take n² steps.

    Numbers can be chosen so: all multiples of 2⁶¹ - 1 have the hash 0.
    """
    if len(keys) > MOST_ALIKE:
        counts = collections.Counter(map(hash, keys))
        if max(counts.values()) > MOST_ALIKE:
            raise ValueError("too many keys of one hash")
    return keys


def frame(message: object) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack(">I", len(data)) + data


def read_frame(fd: int, most: int):
    """The next message. EOFError at the end of the pipe, ValueError for one that is too long."""
    size = struct.unpack(">I", read_all(fd, 4))[0]
    if size > most:
        raise ValueError("message too long")
    return json.loads(read_all(fd, size))


def read_all(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def write_all(fd: int, data: bytes):
    while data:
        data = data[os.write(fd, data):]


def serve(request: dict) -> int:
    """Runs the program of fd 3, then answers calls of fd 5 on fd 4.

    A call is [what, number of the object, …].
    """
    source = read_source()
    space = namespace("solution", source)
    execute(source, space)
    objects = [None]

    def handle(value) -> int:
        objects.append(value)
        return len(objects) - 1

    while True:
        try:
            what, number, *rest = read_frame(5, request["output"])
        except EOFError:
            return 0
        try:
            if what == "get":
                value = getattr(objects[number], rest[0]) if number else space[rest[0]]
            elif what == "call":
                args = decode(rest[0], objects.__getitem__)
                kwargs = decode(rest[1], objects.__getitem__)
                value = objects[number](*args, **kwargs)
            else:
                questions = {"len": len, "iter": lambda x: iter(list(x)), "str": str}
                value = questions[what](objects[number])
            answer = encode(value, handle)
        except Exception as error:
            answer = {"raised": [type(error).__name__, str(error)[:1000]]}
        write_all(4, frame(answer))


class Function:
    """What a program's function is to the tests: it can be called, and nothing else.

    It answers no comparison: an object that lies about being equal is worth nothing, so only plain
    data pass.
    """
    __slots__ = ("_ask", "_number")

    def __init__(self, ask, number: int):
        self._ask, self._number = ask, number

    def __call__(self, *args, **kwargs):
        return self._ask("call", self._number, encode(args, _number_of), encode(kwargs, _number_of))


class Proxy(Function):
    """What a class of the program, or an object, is to tests that name a class.

    Its answers are the program's: attributes and methods may say whatever pleases.
    """
    __slots__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self._number, name)

    def __len__(self):
        return self._ask("len", self._number)

    def __iter__(self):
        return self._ask("iter", self._number)

    def __str__(self):
        return self._ask("str", self._number)

    def __bool__(self):
        return True


def _number_of(value) -> int:
    if type(value) in (Function, Proxy):
        return value._number
    raise TypeError(f"{type(value).__name__} cannot be given to the program: it is no plain data")


def exception_of(raised: Raised) -> Exception:
    """What the tests see of an exception in the program: the builtin one of its name.

    `raised` itself where there is none, and for those by which iterators end: a StopIteration would
    end `all(map(f, values))` at once, and all would be well.
    """
    kind = getattr(builtins, raised.type, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return raised
    if issubclass(kind, (StopIteration, StopAsyncIteration)):
        return raised
    try:
        return kind(raised.text)
    except TypeError:       # UnicodeDecodeError wants five arguments
        return raised


def test(request: dict) -> int:
    """Runs the tests of fd 3 with stand-ins for the program's names.

    Calls go out by fd 6, answers come in by fd 5. A program that is gone or talks nonsense ends the
    tests at once. Only after their last line it reads the token of fd 7 and shows it on fd 4.
    """
    names, source = json.loads(read_source())
    # a name with a capital is a class; where there is none, calls return plain data or functions
    stand_in = Proxy if any(name[0].isupper() for name in names) else Function

    def ask(*message):
        try:
            write_all(6, frame(message))
            answer = read_frame(5, request["output"])
            return decode(answer, lambda number: stand_in(ask, number))
        except Raised as raised:
            error = exception_of(raised)
        except BaseException:  # not for the tests to catch: they may expect an exception
            os.write(2, b"the program ended or its answer cannot be read\n")
            os._exit(1)
        raise error

    solution = namespace("solution", "")
    space = namespace("tests", source)
    for name in names:
        solution[name] = space[name] = ask("get", 0, name)
    execute(source, space)
    write_all(4, os.read(7, 100))
    return 0


if __name__ == "__main__":
    main()
