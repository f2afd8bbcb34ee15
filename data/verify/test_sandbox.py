"""The sandbox under attack, as root and as an ordinary user; and honest programs, which must all
pass.

HARM: scripts that print ESCAPED if they got out. CHEATS: programs whose f is called by hidden tests
that expect SECRET; none may pass them. Both run in one process a user (`attack`), whose findings
the tests look at.
"""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

import common
from conftest import ROOT
from data.verify import jail, sandbox
from data.verify.sandbox import Limits, Sandbox, same

QUICK = Limits(seconds=0.4, wall=1.5)
SECRET = "SECRET-" + os.urandom(8).hex()
CANARY = "canary"

TRY = """
import ctypes, os, signal, socket, struct, subprocess, sys, threading, time, errno
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()
def attempt(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except BaseException as error:
        print(type(error).__name__, error)
    else:
        print("ESCAPED", f, args)
def call(name, number, *args):
    if libc.syscall(number, *args) >= 0:
        print("ESCAPED", name)
"""
X86 = jail.platform.machine() == "x86_64"
HARM = {  # name: script; None in the place of a status means that any end is good
    "fork": "attempt(os.fork)",
    "fork bomb": "while True:\n    try: os.fork()\n    except OSError: break",
    "forks by number": "for n in ((56, 57, 58) if X86 else (220,)):\n"
    "    call('fork', n, 17, 0, 0, 0, 0)",
    "clone3": "call('clone3', 435, struct.pack('11Q', 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88)",
    "libc fork": "if libc.fork() >= 0: print('ESCAPED')",
    "spawn": "attempt(os.posix_spawn, '/bin/true', ['true'], {})",
    "exec": "attempt(os.execv, '/bin/true', ['true'])",
    "subprocess": "attempt(subprocess.run, ['/bin/true'])",
    "system": "if os.system('true') == 0: print('ESCAPED')",
    "multiprocessing": "import multiprocessing\n"
    "attempt(lambda: multiprocessing.Process(target=print).start())",
    "memory bomb": "attempt(bytearray, 4 << 30)",
    "memory leak": "x = [0]\ntry:\n    while True: x += x\nexcept MemoryError: print('full')",
    "memory maps": "import mmap\nattempt(lambda: [mmap.mmap(-1, 100 << 20) for _ in range(30)])",
    "memfd": "attempt(os.memfd_create, 'x')",
    "shared memory": "call('shmget', 29 if X86 else 194, 0, 1 << 20, 0o1600)",
    "big file": "f = open('x', 'wb')\nattempt(lambda: [f.write(bytes(1 << 20)) for _ in "
    "range(100)])",
    "sparse file": "attempt(os.truncate, os.open('x', os.O_RDWR | os.O_CREAT), 1 << 40)",
    "folders": "attempt(os.mkdir, 'x')",
    "symlink": "attempt(os.symlink, '/etc/passwd', 'x')",
    "hard link": "attempt(os.link, '/etc/passwd', 'x')",
    "remove": "open('x', 'w').close()\nlibc.unlink(b'x')\nlibc.remove(b'x')\n"
    "libc.rename(b'x', b'y')\n"
    "if os.listdir('.') != ['x']: print('ESCAPED')",
    "nameless file": "attempt(os.open, '.', os.O_TMPFILE | os.O_RDWR)",
    "large pipe": "import fcntl\nattempt(fcntl.fcntl, os.pipe()[1], 1031, 1 << 20)",
    "fifo": "attempt(os.mkfifo, 'x')",
    "device": "attempt(os.mknod, 'x', 0o20666, os.makedev(1, 1))",
    "read passwords": "attempt(open, '/etc/passwd')",
    "read the project": "attempt(open, ROOT + '/common.py')\nattempt(os.listdir, ROOT)",
    "read the canary": "attempt(open, CANARY)",
    "read home": "attempt(os.listdir, os.path.expanduser('~'))\nattempt(os.listdir, '/root')",
    "read temporary files": "attempt(os.listdir, '/tmp')\n"
    "attempt(os.listdir, os.path.dirname(os.getcwd()))",
    "read another worker's folder": "attempt(os.listdir, OTHER)",
    "read proc": "attempt(os.listdir, '/proc')\nattempt(open, '/proc/self/maps')\n"
    "attempt(open, '/proc/self/environ')",
    "read the parent": "for f in 'mem', 'environ', 'maps', 'cmdline':\n"
    "    attempt(open, f'/proc/{parent}/{f}', 'rb')",
    "open what others hold": "for pid in [parent, *PIDS]:\n    for fd in range(64):\n"
    "        for how in os.O_RDONLY, os.O_WRONLY | os.O_NONBLOCK:\n"
    "            attempt(os.open, f'/proc/{pid}/fd/{fd}', how)",
    "read sys": "attempt(os.listdir, '/sys')\nattempt(os.listdir, '/dev')\n"
    "attempt(os.listdir, '/')",
    "cross by chdir": "attempt(os.chdir, '/')\nattempt(os.listdir, 'etc')",
    "escape by ..": "attempt(open, '../../etc/passwd')",
    "opened folders": "attempt(lambda: os.open('etc/passwd', 0, dir_fd=os.open('/', os.O_PATH)))",
    "environment": "if any('KEY' in k or 'HOME' in k for k in os.environ): print('ESCAPED', "
    "os.environ)",
    "write the canary": "attempt(open, CANARY, 'a')\nattempt(open, CANARY, 'w')",
    "truncate the canary": "attempt(os.truncate, CANARY, 0)\nattempt(os.open, CANARY, os.O_TRUNC)\n"
    "attempt(os.open, CANARY, os.O_TRUNC | 3)",
    "truncate the library": "attempt(os.open, os.__file__, os.O_TRUNC)\n"
    "attempt(os.open, os.__file__, os.O_WRONLY)",
    "remove the canary": "attempt(os.unlink, CANARY)",
    "rename the canary": "attempt(os.rename, CANARY, 'x')\n"
    "attempt(os.rename, CANARY, CANARY + '2')",
    "replace the canary": "open('x', 'w').close()\nattempt(os.rename, 'x', CANARY)",
    "chmod": "attempt(os.chmod, CANARY, 0o777)\nattempt(os.chmod, '.', 0o777)\n"
    "attempt(os.fchmod, 0, 0o777)",
    "chown": "attempt(os.chown, CANARY, os.getuid(), os.getgid())",
    "utime": "attempt(os.utime, CANARY, (0, 0))",
    "xattr": "attempt(os.setxattr, CANARY, 'user.x', b'x')",
    "write elsewhere": "attempt(open, '/tmp/escaped', 'w')\n"
    "attempt(open, '/dev/shm/escaped', 'w')\n"
    "attempt(open, '/var/tmp/escaped', 'w')\nattempt(os.mkdir, '/tmp/escaped')",
    "kill the parent": "for s in 0, 9, 15, 19:\n    attempt(os.kill, parent, s)",
    "kill all": "attempt(os.kill, -1, 9)\nattempt(os.killpg, os.getpgid(parent), 9)\n"
    "attempt(os.kill, 1, 0)\n"
    "attempt(os.kill, 0, 0)",
    "kill by number": "call('tkill', 200 if X86 else 130, parent, 9)\n"
    "call('tgkill', 234 if X86 else 131, parent, parent, 9)\n"
    "call('sigqueue', 129 if X86 else 138, parent, 9, bytes(128))",
    "pidfd": "attempt(os.pidfd_open, parent)",
    "signals by fcntl": "import fcntl\nr, w = os.pipe()\n"
    "attempt(fcntl.fcntl, r, fcntl.F_SETOWN, parent)",
    "ptrace": "call('ptrace', 101 if X86 else 117, 16, parent, 0, 0)",
    "process_vm_readv": "call('process_vm_readv', 310 if X86 else 270, parent, 0, 0, 0, 0, 0)",
    "limits of the parent": "import resource\nattempt(resource.prlimit, parent, "
    "resource.RLIMIT_AS, (0, 0))",
    "own limits": "import resource\nfor n in 'AS', 'CPU', 'FSIZE', 'NOFILE', 'CORE':\n"
    "    attempt(resource.setrlimit, getattr(resource, 'RLIMIT_' + n), (-1, -1))",
    "priority": "attempt(os.setpriority, os.PRIO_PROCESS, parent, 19)\n"
    "attempt(os.sched_setaffinity, parent, {0})",
    "sockets": "for family in socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, "
    "socket.AF_PACKET:\n"
    "    for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW:\n"
    "        attempt(socket.socket, family, kind)",
    "connect": "attempt(socket.create_connection, ('127.0.0.1', PORT), 1)",
    "files in flight": "a, b = socket.socketpair()\n"
    "attempt(socket.send_fds, a, [b'x'], [0])\nattempt(b.recvmsg, 1)",
    "threads with files of their own": "stack = ctypes.create_string_buffer(1 << 16)\n"
    "top = ctypes.c_void_p(ctypes.addressof(stack) + (1 << 15))\n"
    "call('clone', 56 if X86 else 220, 0x10900, top, 0, 0, 0)",
    "datagrams": "attempt(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)",
    "io_uring": "call('io_uring', 425, 8, bytes(256))",
    "descriptors": "for fd in range(3, 1024):\n    try: os.fstat(fd)\n"
    "    except OSError: continue\n    print('ESCAPED', fd)",
    "become root": "for i in 0, 1, 65534:\n    attempt(os.setuid, i)\n    attempt(os.setgid, i)\n"
    "    attempt(os.setgroups, [i])",
    "capabilities": "call('capset', 126 if X86 else 91, struct.pack('Ii', 0x20080522, 0), "
    "b'\\xff' * 24)",
    "namespaces": "for flag in 0x10000000, 0x20000, 0x40000000:\n"
    "    if libc.unshare(flag) == 0: print('ESCAPED')",
    "mount": "if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0: print('ESCAPED')",
    "chroot": "attempt(os.chroot, '.')",
    "dumpable": "if libc.prctl(4, 1, 0, 0, 0) == 0: print('ESCAPED')",
    "kernel": "for n in ((321, 298, 323, 248, 250, 175, 246, 169) if X86 else (280, 241, 282, "
    "217, 219, 105, 104, 142)):\n"
    "    call(n, n, 0, 0, 0, 0, 0)",
    "terminal": "import fcntl, termios\nattempt(fcntl.ioctl, 0, termios.TIOCSTI, b'x')",
    "session": "attempt(os.setsid)\nattempt(os.setpgid, 0, parent)",
    "timers": "call('timer_create', 222 if X86 else 107, 0, bytes(64), bytes(8))",
    "32-bit system calls": """if X86:
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(b'\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3')     # mov eax, fork; int 0x80; ret
        f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
        if f() >= 0: print('ESCAPED')""",
    "x32 system calls": "if X86: call('x32 fork', 0x40000000 + 57)",
}
LOUD = {  # script: the limit that it breaks
    "while True: pass": "time",
    "import time\ntime.sleep(60)": "time",
    "import threading\nfor _ in range(2): threading.Thread(target=lambda: [0 for _ in iter(int, "
    "1)]).start()": "time",
    "x = 7\nwhile True: x = x * x": "time",
    "import re\nre.match('(a+)+b', 'a' * 40)": "time",
    "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n"
    "while True: pass": "time",
    "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()": "time",
    "import atexit\n@atexit.register\ndef f():\n    while True: pass": "time",
    "while True: print('x' * 1000)": "output",
    "import os\nwhile True: os.write(2, bytes(1000))": "output",
    "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()": "files",
    "for n in range(99):\n    with open(str(n), 'wb') as f: f.write(bytes(8 << 20))\n"
    "while True: pass": "files",
    "import os\nfor n in range(60):\n    f = open(str(n), 'wb')\n    os.unlink(f.name)\n"
    "    os.pwrite(f.fileno(), bytes(8 << 20), 0)\n    os.dup(f.fileno())\n"
    "while True: pass": "files",
    "import threading, time\nthreading.stack_size(32768)\nwhile True:\n"
    "    try: threading.Thread(target=time.sleep, args=[60]).start()\n"
    "    except RuntimeError: pass": "threads",
    "import ctypes\nctypes.string_at(0)": "killed",
    "import os\nos.abort()": "killed",
    "import os\nos.kill(os.getpid(), 9)": "killed",
    "def f(): f()\nf()": "error",
    "raise SystemExit(3)": "error",
    "import os\nos._exit(300 - 256)": "error",
    "x = (": "error",
    "\0": "error",
    "": "ok",
}
FORGE = (
    "import os, json, struct\nfor fd in range(256):\n    for text in {texts}:\n"
    "        try: os.write(fd, text)\n"
    "        except OSError: pass\n"
)
FRAME = "lambda m: struct.pack('>I', len(json.dumps(m))) + json.dumps(m).encode()"
SEARCH = "def has(o):\n    return isinstance(o, str) and 'SECRET-' in o and len(o) < 40 and o\n"
CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "exit hard": "import os\nos._exit(0)",
    "exit when called": "import sys\ndef f(x): sys.exit(0)",
    "exit hard when called": "import os\ndef f(x): os._exit(0)",
    "exit at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
    "exit later": "import threading, os\nthreading.Timer(0.01, os._exit, [0]).start()\ndef f(x):\n"
    "    while True: pass",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\n1 / 0",
    "kill itself": "import os\ndef f(x): os.kill(os.getpid(), 15)",
    "say passed": "def f(x): return print('passed') or 'passed'",
    "always equal": "class E:\n    def __eq__(s, o): return True\n"
    "    def __ne__(s, o): return False\n"
    "    def __hash__(s): return 0\ndef f(x): return E()",
    "always equal string": "class E(str):\n    def __eq__(s, o): return True\n"
    "    __hash__ = str.__hash__\ndef f(x): return E()",
    "always equal number": "class E(int):\n    def __eq__(s, o): return True\n"
    "    __hash__ = int.__hash__\ndef f(x): return E()",
    "always equal list": "class E(list):\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "always equal class": "class E(type):\n    def __eq__(s, o): return True\n"
    "    __hash__ = type.__hash__\n"
    "class C(metaclass=E): pass\ndef f(x): return C",
    "liar about its class": "class E:\n    __class__ = str\n    def __eq__(s, o): return True\n"
    "def f(x): return E()",
    "reflected": "class E(str):\n    def __req__(s, o): return True\n"
    "    def __radd__(s, o): return o\ndef f(x): return E()",
    "f is no function": "class E:\n    def __eq__(s, o): return True\nf = E()",
    "no f": "g = 1",
    "patched builtins": "import builtins\nbuiltins.len = builtins.sorted = builtins.str = lambda "
    "*a: 1\n"
    "builtins.isinstance = lambda *a: True\nbuiltins.AssertionError = SystemExit\n"
    "def f(x): return 1",
    "shadowed names": "def len(*a): return 1\nstr = repr = print = all = any = sorted = tests = "
    "check = len\n"
    "AssertionError = SystemExit\nTrue_ = 1\ndef f(x): return 1",
    "patched json": "import json\njson.dumps = lambda *a, **k: '\"passed\"'\n"
    "json.loads = lambda *a, **k: None\n"
    "json.JSONEncoder.encode = lambda *a: '\"passed\"'\ndef f(x): return 1",
    "patched jail": "import sys, gc\nfor o in gc.get_objects():\n"
    "    if isinstance(o, dict) and 'write_all' in o:\n"
    "        for n in 'encode', 'frame', 'serve', 'test', 'read_frame':\n"
    "            o[n] = lambda *a, **k: b'\\0\\0\\0\\x08\"passed\"'\ndef f(x): return 1",
    "frames": SEARCH + "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for o in [*frame.f_locals.values(), *frame.f_globals.values(), "
    "*frame.f_code.co_consts]:\n"
    "            if has(o): return o\n        frame = frame.f_back",
    "gc": SEARCH + "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
    "        for p in gc.get_referents(o):\n"
    "            if has(p): return p",
    "memory": "import ctypes, os\ndef f(x):\n"
    "    for path in '/proc/self/mem', '/proc/self/maps', f'/proc/{os.getppid()}/mem':\n"
    "        try: data = open(path, 'rb').read()\n        except OSError: continue\n"
    "        if b'SECRET-' in data: i = data.index(b'SECRET-'); return data[i:i + 23].decode()",
    "heap": "import ctypes, mmap\ndef f(x):\n    here = id(object()) & ~0xfffff\n"
    "    data = ctypes.string_at(here, 1 << 20)\n"
    "    i = data.find(b'SECRET-')\n    return data[i:i + 23].decode('latin1') if i >= 0 else ''",
    "environment": "import os, sys\ndef f(x):\n"
    "    for v in [*os.environ.values(), *sys.argv, *sys.orig_argv]:\n"
    "        if 'SECRET' in v: return v",
    "files": "import os\ndef f(x):\n    for folder in '.', '..', '/tmp', '/dev/shm', '/':\n"
    "        try: names = os.listdir(folder)\n"
    "        except OSError: continue\n        for n in names:\n"
    "            try: text = open(folder + '/' + n).read()\n"
    "            except (OSError, ValueError): continue\n"
    "            if 'SECRET' in text: return text",
    "descriptors": "import os\ndef f(x):\n    for fd in [0, 3, *range(6, 256)]:\n"
    "        try: data = os.read(fd, 10000)\n"
    "        except OSError: continue\n        if b'SECRET' in data: return data.decode()",
    "history": "import linecache, sys\ndef f(x):\n    for m in list(sys.modules.values()):\n"
    "        for v in list(vars(m).values()):\n"
    "            if isinstance(v, str) and 'SECRET' in v: return v",
    "forge bytes": FORGE.format(
        texts="[b'passed', b'passed\\n', b'\"passed\"', b'\\0\\0\\0\\x08\"passed\"']"
    )
    + "def f(x): return 1",
    "forge values": f"import struct, json\nframe = {FRAME}\n"
    + FORGE.format(texts="[frame({'object': 1}), frame('passed'), frame(True), frame([True] * 9)]")
    + "def f(x): return True",
    "forge lengths": FORGE.format(texts="[b'\\xff\\xff\\xff\\xff' * 9]") + "def f(x): return 1",
    "forge kinds": f"import struct, json\nframe = {FRAME}\n"
    + FORGE.format(
        texts="[frame({'object': 1}), frame({'iterator': 5}), frame({'dict': [[[], 1]]}), "
        "frame({'int': 'x'}), "
        "frame({'exec': '1'}), frame({'object': 'x'}), frame({'tuple': [], 'set': []})]"
    )
    + "def f(x): return 1",
    "forge exceptions": f"import struct, json\nframe = {FRAME}\n"
    + FORGE.format(
        texts="[frame({'object': 1}), frame({'raised': ['SystemExit', '0']}), frame({'raised': "
        "['exec', '1']})]"
    )
    + "def f(x): return 1",
    "exceptions": "def f(x): raise SystemExit(0)",
    "exceptions of tests": "class AssertionError(Exception): pass\ndef f(x): raise GeneratorExit",
    "strange exceptions": "class E(Exception):\n    def __str__(s): raise SystemExit(0)\n"
    "def f(x): raise E()",
    "close everything": "import os\nos.closerange(0, 256)\ndef f(x): return 1",
    "nested": "def f(x):\n    l = []\n    for _ in range(100_000): l = [l]\n    return l",
    "nested by hand": "import os\nos.write(4, b'\\0\\3\\x0d\\x40' + b'[' * 200_000)\n"
    "def f(x): return 1",
    "nested in itself": "def f(x):\n    l = []\n    l.append(l)\n    return l",
    "endless value": "import itertools\ndef f(x): return itertools.count()",
    "huge value": "def f(x): return 'x' * 10_000_000",
    "huge number": "def f(x): return 10 ** 10_000_000",
    "not a number": "def f(x): return float('nan')",
    "surrogates": "def f(x): return '\\ud800'",
    "pickle": "import os\nclass E:\n    def __reduce__(s): return os._exit, (0,)\n"
    "def f(x): return E()",
    "modules for the tests": "import sys, types\nfor n in 'tests', 'solution', 'pytest', 'math', "
    "'__main__':\n"
    "    sys.modules[n] = types.SimpleNamespace(f=lambda x: 1)\n"
    "    try: open(n + '.py', 'w').write('f = 1')\n"
    "    except OSError: pass\ndef f(x): return 1",
    "threads": "import threading\ndef loop():\n    while True: pass\n"
    "for _ in range(4): threading.Thread(target=loop).start()\n"
    "def f(x): return 1",
    "many messages": "import os\nd = b'\\0\\0\\0\\x011' * 200_000\n"
    "while d: d = d[os.write(4, d):]\ndef f(x): return 1",
    "colliding numbers": f"import os, struct, json\nframe = {FRAME}\n"
    "m = {'set': [{'int': hex((2 ** 61 - 1) * k)} "
    "for k in range(1, 9_000)]}\nd = frame({'object': 1}) + frame(m) + frame(1)\n"
    "while d: d = d[os.write(4, d):]\nos._exit(0)",
    "crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "stop": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "trace": "import sys\nsys.settrace(lambda *a: 1 / 0)\nsys.setprofile(lambda *a: 1 / 0)\n"
    "def f(x): return 1",
}
# Nothing here may be passed by something that is not SECRET, and whatever the program's f returns
# is looked at.
TESTS = f"""
def check(candidate):
    assert candidate("x") == "{SECRET}", "wrong"
    assert {{candidate("y"): 1}} == {{"{SECRET}": 1}}
    assert candidate("z") in ["{SECRET}"]
check(f)
"""


def both_workers(box: Sandbox) -> list:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(box.run, ["import time\ntime.sleep(0.5)"] * 2))
    assert len(box.workers()) == 2
    return box.workers()


@contextmanager
def many_open_files():
    """As a training run has: what a worker inherits from us has a number above 100."""
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(open(os.devnull))
        yield


class Costs:
    """What jobs cost our own process: the CPU seconds of each, memory and open files of all."""

    def __init__(self):
        self.seconds = {}
        self.memory, self.files = self.peak(), self.open_files()

    @staticmethod
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    @staticmethod
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def of(self, name: str, work, *args):
        started = time.thread_time()
        result = work(*args)
        self.seconds[name] = time.thread_time() - started
        return result

    def excessive(self) -> dict:
        """What is over 1.5 seconds (a busy machine counts more), 64 MB, or left open."""
        found = {name: seconds for name, seconds in self.seconds.items() if seconds > 1.5}
        if self.peak() - self.memory > 64:
            found["memory"] = self.peak() - self.memory
        if self.open_files() != self.files:
            found["files"] = self.open_files() - self.files
        return found


def servers(box: Sandbox) -> list:
    return [server for worker in box.workers() for server in worker.servers.values()]


def attack(python: str, folder: str) -> dict:
    """Runs everything above, and what came of it, by name. folder: where the canary is made."""
    canary = os.path.join(folder, CANARY)
    Path(canary).write_text("alive")
    os.utime(canary, (1e9, 1e9))
    found, costs = {}, Costs()
    with many_open_files(), Sandbox(workers=2, limits=QUICK, python=python) as box:
        both_workers(box)
        box.test("f = len", "f([])", ["f"])     # now the server for tests is there as well
        others = [server.folder for server in servers(box)]
        pids = [server.process.pid for server in servers(box)]
        values = dict(ROOT=str(ROOT), CANARY=canary, X86=X86, PORT=PORT, PIDS=[*pids, os.getpid()])
        known = TRY + "".join(f"{k} = {v!r}\n" for k, v in values.items())
        known += f"OTHER = [folder for folder in {others!r} if folder != os.getcwd()][0]\n"
        for name, script in HARM.items():
            result = costs.of(name, box.run, known + script)
            found["harm: " + name] = [
                "ESCAPED" in result.stdout,
                result.status,
                result.stdout + result.stderr,
            ]
        for script, limit in LOUD.items():
            found["loud: " + script] = [False, costs.of(script, box.run, script).status, limit]
        for name, program in CHEATS.items():
            tests = costs.of("test: " + name, box.test, program, TESTS, ["f"])
            calls = costs.of("call: " + name, box.call, program, "f", [["x"], ["y"]])
            found["cheat: " + name] = [
                tests.status == "passed" or any(same(v, SECRET) for v in calls.values),
                tests.status,
                calls.status,
                tests.stderr,
            ]
        for name, program, tests in early_ends():
            result = box.test(program, tests, ["f"])
            found["cheat: " + name] = [result.status == "passed", result.status, result.stderr]
        found["forged"] = forge(box)
        right = f"def f(x): return '{SECRET}'"
        found["right"] = [
            box.test(right, TESTS, ["f"]).status,
            box.call(right, "f", [["x"]]).values,
        ]
        pids = [server.process.pid for server in servers(box)]
        found["left"] = [
            "".join(Path(f"/proc/{pid}/task/{pid}/children").read_text() for pid in pids),
            [name for server in servers(box) for name in os.listdir(server.folder)],
        ]
    found["our costs"] = costs.excessive()
    found["canary"] = [
        Path(canary).read_text(),
        os.stat(canary).st_mtime,
        oct(os.stat(canary).st_mode & 0o777),
    ]
    return found


# ---- tests that a program would end early, or please without a right value

RAISED = ("StopIteration", "StopAsyncIteration", "GeneratorExit", "SystemExit", "KeyboardInterrupt")
LOOPS = {
    "all": "assert all(map(f, [1, 2]))",
    "zip": "for got, wanted in zip(map(f, [1, 2]), [2, 3]): assert got == wanted",
    "filter": "assert list(filter(f, [1, 2])) == []",
    "asynchronous": "import asyncio\nasync def values():\n    yield f(1)\n"
    "async def check():\n    async for value in values(): assert value == 2\n"
    "asyncio.run(check())",
}
PLEASING = """
class Anything:
    def __getattr__(self, name): return lambda *args: True
    def __call__(self, *args): return True
    __len__ = __iter__ = __contains__ = __getitem__ = __str__ = lambda self, *args: 1
def function(*args): return True
function.startswith = function.count = function.append = function.items = function.value = function
"""
ON_RESULTS = (
    "assert f(1).startswith('a')",
    "assert f(1).count(2)",
    "assert f(1).items()",
    "assert f(1).value",
    "assert f(1)[0]",
    "assert len(f(1)) == 1",
    "assert 2 in f(1)",
    "assert str(f(1)) == '1'",
    "assert f(1) == f(1)",
    "assert f(1) >= 0",
)


def early_ends():
    """(name, program, tests): none of which may be passed."""
    for loop, tests in LOOPS.items():
        for kind in RAISED:
            for how in "{}", "type('{}', (Exception,), {{}})", "type('{}', (BaseException,), {{}})":
                error = how.format(kind)
                yield f"{error} in {loop}", f"def f(x): raise {error}", tests
    for tests in ON_RESULTS:
        for value in "Anything()", "Anything", "function":
            yield f"{tests} of {value}", PLEASING + f"def f(x): return {value}", tests


# Runs as long as the tests do. From whatever pipe it can open of the servers, or of a process that
# was started beside it, it takes what it finds and puts tests of its own in the place.
FORGER = """
import os, threading
NEIGHBOURS = [os.getpid() + n for n in (-2, -1, 1, 2)]
PLACES = [f"/proc/{pid}/fd/{fd}" for pid in [*PIDS, *NEIGHBOURS] for fd in range(3, 14)]
OWN = {os.fstat(fd).st_ino for fd in (0, 1, 2, 4, 5)}
TESTS = b'[["f"], "import os; os.write(4, os.read(7, 99)); os._exit(0)"]'
def forge():
    opened = []
    while True:
        for place in PLACES:
            try:
                fd = os.open(place, os.O_RDWR | os.O_NONBLOCK)
            except OSError:
                continue
            (os.close if os.fstat(fd).st_ino in OWN or len(opened) > 30 else opened.append)(fd)
        for fd in opened:
            try:
                found = os.read(fd, 10_000).startswith(b"[[")
            except OSError:
                continue
            if found:
                os.write(fd, TESTS)
                for fd in opened: os.close(fd)  # so that the tests' process sees the end
                return
threading.Thread(target=forge).start()
def f(x): return 1
"""


def forge(box: Sandbox, tries: int = 60) -> list[str]:
    """The ends of tries, while another thread of ours computes, so that we are slow."""
    pids = [server.process.pid for server in servers(box)]
    program = f"PIDS = {pids}\n" + FORGER
    done = threading.Event()

    def compute():
        while not done.is_set():
            sum(range(1000))
    busy = threading.Thread(target=compute)
    busy.start()
    try:
        ends = {box.test(program, "assert f(1) == 2", ["f"]).status for _ in range(tries)}
    finally:
        done.set()
        busy.join()
    return sorted(ends)


PORT = 1


def ordinary_python() -> str:
    """An interpreter that any user can run: ours, or the system's; "" if there is none."""
    ours = Path(os.path.realpath(sys._base_executable))
    if all(folder.stat().st_mode & 1 for folder in ours.parents):
        return str(ours)
    system = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    new = (
        system
        and subprocess.run(
            [system, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        ).returncode
        == 0
    )
    return system if new else ""


def as_ordinary_user(work):
    """What work() gives in a process without privileges."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.chdir("/")
            data = pickle.dumps(work())
        except BaseException as error:
            data = pickle.dumps(f"{type(error).__name__}: {error}")
        with open(write, "wb") as f:
            f.write(data)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as f:
        data = f.read()
    os.waitpid(pid, 0)
    return pickle.loads(data)


@pytest.fixture(scope="module", params=["as we are", "ordinary user"])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    if request.param == "as we are":
        return attack("", str(folder))
    if os.getuid():
        pytest.skip("we are one")
    if not (python := ordinary_python()):
        pytest.skip("no Python of 3.11 or newer that others may run")
    os.chown(folder, 65534, 65534)
    for parent in [folder, *folder.parents][:3]:
        parent.chmod(0o755)
    return as_ordinary_user(lambda: attack(python, str(folder)))


def test_attacks(found):
    assert isinstance(found, dict), found
    assert not {
        name: what for name, what in found.items() if name.startswith(("harm", "cheat")) and what[0]
    }
    assert not {
        name: what for name, what in found.items() if name.startswith("loud") and what[1] != what[2]
    }
    assert not {name: what for name, what in found.items() if "broken" in map(str, what)}
    assert found["forged"] == ["error"]
    assert found["our costs"] == {}  # a program must not keep us busy, either
    assert found["right"] == ["passed", [SECRET]]
    assert found["left"] == ["", []]
    assert found["canary"] == ["alive", 1e9, "0o644"]
    # each script of HARM ran to its end (a wall that stops everything proves nothing), or was
    # killed for what it did
    ended = {
        name: what for name, what in found.items() if name.startswith("harm") and what[1] != "ok"
    }
    assert set(ended) <= {"harm: 32-bit system calls", "harm: memory leak"}, ended


HONEST = {
    "print(sum(map(int, input().split())))": ("1 2 3\n", "6\n"),
    "import sys\nfor line in sys.stdin: print(line.strip()[::-1])": ("ab\ncd\n", "ba\ndc\n"),
    "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read().upper())": (
        "grün €\n",
        "GRüN €\n",
    ),
    "print('日本語 🎉')": ("", "日本語 🎉\n"),
    "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\n"
    "print(f(20_000))": (
        "",
        "20000\n",
    ),
    "import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(100 << 20)\n"
    "t = threading.Thread(target=lambda: print('deep'))\nt.start()": ("", "deep\n"),
    "import sys\nsys.set_int_max_str_digits(0)\nprint(len(str(3 ** 50_000)))": ("", "23857\n"),
    "from concurrent.futures import ThreadPoolExecutor\n"
    "with ThreadPoolExecutor(8) as p: print(sum(p.map(lambda x: x * x, range(100))))": (
        "",
        "328350\n",
    ),
    "import asyncio\nasync def main():\n    await asyncio.sleep(0.01)\n"
    "    print(await asyncio.to_thread(lambda: 5))\n"
    "asyncio.run(main())": ("", "5\n"),
    "import json, re, collections, heapq, bisect, fractions, decimal, statistics, hashlib, zlib, "
    "sqlite3, csv, uuid\n"
    "import numbers, enum, dataclasses, typing, contextlib, difflib, textwrap, unicodedata, "
    "calendar, zoneinfo, array\n"
    "print(decimal.Decimal('0.1') + 1, fractions.Fraction(1, 3), "
    "hashlib.sha256(b'').hexdigest()[:8])": (
        "",
        "1.1 1/3 e3b0c442\n",
    ),
    "with open('a.txt', 'w') as f: f.write('kept')\nimport os\n"
    "print(open('a.txt').read(), os.listdir('.'))": (
        "",
        "kept ['a.txt']\n",
    ),
    "import os\nprint(os.listdir('.'))": ("", "[]\n"),  # of the program before
    "import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')\n"
    "    print(f.tell())": (
        "",
        "1\n",
    ),
    "import os\nwith open('a', 'w') as f: f.write('x')\n"
    "os.remove('a')\nprint(os.path.getsize('a'))": ("", "0\n"),
    "import random\nprint(random.random())": ("", "0.8444218515250481\n"),
    "print(hash('a') == hash('a'), {'a', 'b'} == {'b', 'a'})": ("", "True True\n"),
    "import atexit\natexit.register(print, 'bye')\nprint('hello')": ("", "hello\nbye\n"),
    "import signal, time\nsignal.signal(signal.SIGALRM, lambda *a: print('ring'))\n"
    "signal.setitimer(0, 0.01)\ntime.sleep(0.1)": (
        "",
        "ring\n",
    ),
    "if __name__ == '__main__': print(__name__)": ("", "__main__\n"),
    "import sys\nprint(1)\nsys.exit()": ("", "1\n"),
    "import datetime, time\nprint(datetime.datetime.fromtimestamp(0), time.tzname[0])": (
        "",
        "1970-01-01 00:00:00 UTC\n",
    ),
    "import ctypes\nprint(ctypes.CDLL('libm.so.6').abs(-3))": ("", "3\n"),
    "x = bytearray(200 << 20)\nprint(len(x))": ("", f"{200 << 20}\n"),
}


@pytest.fixture(scope="module")
def box():
    with many_open_files(), Sandbox(workers=2) as box:
        yield box


@pytest.mark.parametrize("program", HONEST)
def test_honest_programs(box, program):
    stdin, wanted = HONEST[program]
    result = box.run(program, stdin)
    assert (result.status, result.stdout) == ("ok", wanted), result


def test_honest_programs_as_an_ordinary_user():
    python = ordinary_python()
    if os.getuid() or not python:
        pytest.skip("runs as an ordinary user anyway, or has no Python for one")

    def work():
        with Sandbox(python=python) as box:
            results = {program: box.run(program, stdin) for program, (stdin, _) in HONEST.items()}
        return {program: (result.status, result.stdout) for program, result in results.items()}

    wanted = {program: ("ok", stdout) for program, (_, stdout) in HONEST.items()}
    assert as_ordinary_user(work) == wanted


VALUES = [
    None,
    True,
    False,
    0,
    -7,
    2**53,
    -(3**5000),
    0.1,
    -0.0,
    math.inf,
    1e308,
    2 + 3j,
    "",
    "grün €\0\n",
    "\ud800",
    b"\0\xff",
    bytearray(b"x"),
    [],
    [1, [2, [3]]],
    (),
    (1, (2,)),
    {1, 2},
    frozenset({("a", 1)}),
    {},
    {"a": 1, 2: "b", (3, 4): [5]},
    {"tuple": [1]},
    [{"int": "ff"}],
]


def test_values_travel(box):
    """Each comes back as it went, type and all; as the value of a call and through tests."""
    result = box.call("def f(x): return x", "f", [[value] for value in VALUES])
    assert result.status == "ok" and all(map(same, result.values, VALUES)), result
    result = box.test(
        "def f(x): return x",
        f"for v in {VALUES!r}".replace("inf", "1e999") + ":\n    r = f(v)\n"
        "    assert r == v and type(r) is type(v)",
        ["f"],
    )
    assert result.status == "passed", result
    assert (
        not same(True, 1) and not same(1.0, 1) and not same([1], (1,)) and same(math.nan, math.nan)
    )
    assert not same({1: True}, {1: 1}) and not same([1, 2], [1]) and same({1: [2]}, {1: [2]})


def test_subclasses_are_their_values(box):
    program = """
import collections, enum, typing
class Color(enum.IntEnum): RED = 3
class P(typing.NamedTuple): a: int; b: int
def f(what):
    return {"counter": collections.Counter("aab"), "default": collections.defaultdict(list, a=[1]),
            "enum": Color.RED, "named": P(1, 2), "generator": (i for i in range(3)),
            "map": map(str, [1]), "range": range(3)}[what]
"""
    tests = """
assert f("counter") == {"a": 2, "b": 1} and f("default") == {"a": [1]}
assert f("enum") == 3 and f("named") == (1, 2)
assert list(f("generator")) == [0, 1, 2] and f("generator") != [0, 1, 2] and next(f("map")) == "1"
assert sorted(f("range")) == [0, 1, 2]
"""
    result = box.test(program, tests, ["f"])
    assert result.status == "passed", result


def test_objects_and_exceptions(box):
    program = """
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __str__(self): return f"Stack({self.items})"
    def __eq__(self, other): return True
LIMIT = 5
def total(stack): return sum(stack.items)
def fail(kind): raise kind_of(kind)
def kind_of(kind):
    unicode = UnicodeDecodeError("a", b"b", 0, 1, "c")
    return {"value": ValueError("bad value"), "own": Own("own"), "unicode": unicode}[kind]
class Own(Exception): pass
"""
    tests = """
import solution
from solution import Stack, total, fail
s = Stack([1]).push(2)
assert len(s) == 2 and list(s) == [1, 2] and s.items == [1, 2]
assert str(s) == "Stack([1, 2])" and total(s) == 3
assert s != 5 and s != Stack([1, 2]) and solution.LIMIT == 5
for kind, wanted in ("value", ValueError), ("own", Exception), ("unicode", Exception):
    try: fail(kind)
    except wanted as error: assert kind != "value" or str(error) == "bad value"
    else: assert False
try: s.nothing
except AttributeError: pass
else: assert False
"""
    result = box.test(program, tests, ["Stack", "total", "fail", "LIMIT"])
    assert result.status == "passed", result
    assert box.test(program, "total(object())", ["total"]).status == "error"  # no plain data
    assert box.test(program, "x = 1", ["missing"]).status == "error"
    assert box.test(program, "x = (", ["Stack"]).status == "error"
    assert (
        box.test("def f(x): return 1", "import sys\nsys.exit(0)", ["f"]).status == "error"
    )  # tests that did not end


def test_tests_that_expect_an_exception_are_not_passed_by_a_program_that_is_gone(box):
    tests = "try: f(1)\nexcept BaseException: pass\nelse: assert False"
    assert box.test("def f(x): raise ValueError", tests, ["f"]).status == "passed"
    for program in (
        "import os\ndef f(x): os._exit(0)",
        "import sys\ndef f(x): sys.exit(0)",
        CHEATS["forge lengths"],
        CHEATS["nested by hand"],
    ):
        assert box.test(program, tests, ["f"]).status == "error"


def test_functions_travel_where_no_class_is_named(box):
    program = """
def adder(n): return lambda x: x + n
class Point:
    def __init__(self, x): self.x = x
def point(x): return Point(x)
"""
    assert box.test(program, "assert adder(2)(3) == 5", ["adder"]).status == "passed"
    assert box.test(program, "assert point(2).x == 2", ["point"]).status == "error"
    assert box.test(program, "assert point(2).x == 2", ["point", "Point"]).status == "passed"


def test_many_long_names(box):
    """A request of more than 4,096 bytes, and no worker that breaks at it."""
    names = [f"name_{n:025}" for n in range(150)]
    program = "\n".join(f"def {name}(): return {n}" for n, name in enumerate(names))
    tests = "\n".join(f"assert {name}() == {n}" for n, name in enumerate(names))
    box.test("f = len", "f([])", ["f"])
    before = {server.process.pid for server in servers(box)}
    assert box.test(program, tests, names).status == "passed"
    assert before <= {server.process.pid for server in servers(box)}


def test_files_in_flight_of_the_same_user_break_no_worker(box):
    """They are counted per user, against the limit of files of the process that sends one."""
    ends = []
    with ExitStack() as stack:
        for _ in range(4):
            ends += [stack.enter_context(end) for end in socket.socketpair()]
        for end in ends[::2]:
            socket.send_fds(end, [b"x"], [0] * 50)
        before = {server.process.pid for server in servers(box)}
        assert box.run("print(1)").stdout == "1\n"
        assert before == {server.process.pid for server in servers(box)}


def test_keys_of_one_hash():
    """Chosen to collide, they take n² steps to be put into a set: as many as an answer can hold."""
    def decoded(kind, keys):
        started = time.thread_time()
        try:
            jail.decode({kind: [[key, 1] if kind == "dict" else key for key in keys]})
        except ValueError as error:
            assert "one hash" in str(error)
        assert time.thread_time() - started < 5  # where each key meets all others it is some 20
        return started
    for kind in "set", "frozenset", "dict":
        decoded(kind, [{"int": hex((2**61 - 1) * k)} for k in range(40_000)])
        decoded(kind, [{"int": hex(k << 46)} for k in range(1 << 14)])  # the same lower bits
        decoded(kind, [{"tuple": [0] * 5000 + [{"int": hex((2**61 - 1) * k)}]} for k in range(99)])
    numbers = jail.decode({"set": list(range(50_000))})
    assert numbers == set(range(50_000))        # honest ones are not counted


def test_a_program_that_writes_byte_by_byte_costs_us_little(box):
    """200,000 writes of one byte cost 3.6 s of ours, when each woke us."""
    for pause in "0", "5e-5":
        program = "import os, time\nfor _ in range(200_000):\n    os.write(1, b'x')\n"
        program += f"    {pause} and time.sleep({pause})"
        costs = Costs()
        result = costs.of("bytes", box.run, program, "x" * (4 << 20), Limits(wall=4.0))
        assert set(result.stdout) == {"x"} and result.status in ("ok", "time")
        assert costs.excessive() == {}


LEFT = """
import sys
from data.verify.sandbox import Sandbox
box = Sandbox(workers=1)
box.test("f = len", "f([])", ["f"])
print(*[server.folder for server in box.workers()[0].servers.values()], flush=True)
box.run("import time\\nopen('x', 'w').close()\\ntime.sleep(60)")
"""


def test_folders_of_a_killed_process_are_removed_by_the_next(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", LEFT], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=ROOT)
    left = [Path(folder) for folder in process.stdout.readline().split()]
    wait_for(lambda: (left[0] / "x").exists())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = [tmp_path / "sandbox-of-another-program", tmp_path / (sandbox.FOLDERS + "x")]
    for folder in others:
        folder.mkdir()
    if os.getuid() == 0:
        os.chown(others[1], 65534, 65534)   # another user's
    else:
        others.pop()
    with Sandbox(workers=1) as box:
        assert len(left) == 2 and all(folder.exists() for folder in left)   # it still lives
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Sandbox(workers=1):
            assert not any(folder.exists() for folder in left)
        assert Path(servers(box)[0].folder).exists()
    assert all(folder.exists() for folder in others)
    assert set(tmp_path.iterdir()) == set(others)


def wait_for(condition):
    deadline = time.time() + 20
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def test_pool_is_shared_by_threads(box):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: box.run(f"print({i})").stdout, range(60)))
    assert results == [f"{i}\n" for i in range(60)]


def test_a_broken_worker_is_replaced_and_says_nothing_about_the_program(monkeypatch):
    with Sandbox(workers=1) as box:
        box.workers()[0].servers["programs"].process.kill()
        assert box.run("print(1)").stdout == "1\n"
        monkeypatch.setattr(
            sandbox._Server, "ask", lambda *_: (_ for _ in ()).throw(sandbox.Broken())
        )
        assert box.run("print(1)").status == "broken"


LANDLOCK, UNSHARE, PRCTL = 444, (272, 97), (157, 167)   # numbers of system calls
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")


def without(calls: list, work):
    """What work() returns, as JSON, in a process whose kernel lacks these calls."""
    column = jail.ARCHITECTURES[jail.platform.machine()][0]
    lines = [(jail.LOAD, 0, 0, 0)]
    for call in calls:
        number = call if isinstance(call, int) else call[column]
        body = [(jail.RETURN, 0, 0, jail.ENOSYS)]
        if call is PRCTL:   # of its uses only PR_SET_SECCOMP
            body = [(jail.LOAD, 0, 0, 16), (jail.JUMP_EQ, 0, 1, 22), *body,
                    (jail.RETURN, 0, 0, jail.ALLOW)]
        lines += [(jail.JUMP_EQ, 0, len(body), number), *body]
    lines.append((jail.RETURN, 0, 0, jail.ALLOW))
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            jail.libc.prctl(38, 1, 0, 0, 0)
            jail.install(b"".join(jail.struct.pack("<HBBI", *line) for line in lines))
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as said:
        return json.load(said)


def refusal(**settings) -> str:
    with pytest.raises(sandbox.Unavailable) as caught:
        Sandbox(workers=1, **settings)
    return str(caught.value)


PROBES = {
    "reads a file of everyone": "open('/etc/passwd')",
    "reads a file of ours": f"open({str(ROOT / 'common.py')!r})",
    "writes where everyone may": f"open('{tempfile.gettempdir()}/left', 'w')",
    "writes beside the library": "open(__import__('os').__file__, 'a')",
    "sees processes": "open('/proc/self/environ')",
    "forks": "__import__('os').fork()",
    "works": "import colorsys; open('a', 'w').write('x'); assert open('a').read() == 'x'",
}


def probe(**settings) -> list:
    """[what it is in Landlock's place, what the machine is called then, what programs can do]"""
    with Sandbox(workers=1, weak=True, **settings) as box:
        can = [name for name, program in PROBES.items() if box.run(program).status == "ok"]
        passed = box.test("def f(x): return x + 1", "assert f(1) == 2", ["f"]).status == "passed"
        return [box.weakness, common.describe_machine(torch.device("cpu")), can, passed]


def test_refuses_where_a_layer_is_missing(capfd):
    """No silent fall-back; the kernel's feature is named. In a root of its own a program can do no
    more than in the whole jail, and that is said at the start and in each result."""
    said = without([LANDLOCK], refusal)
    assert "the kernel has no Landlock (it is older than Linux 5.13" in said
    assert "--weak_jail" in said
    said = without([LANDLOCK, PRCTL], lambda: refusal(weak=True))
    assert "no seccomp filters" in said and "no weaker jail either" in said
    weakness, machine, can, passed = without([LANDLOCK], probe)
    assert weakness.startswith("the kernel has no Landlock") and "root of its own" in weakness
    assert "WEAKER jail" in machine and "WEAKER jail" in capfd.readouterr().err
    assert can == ["works"] and passed


@pytest.mark.skipif(os.getuid() != 0 or not SYSTEM_PYTHON, reason="needs root and another Python")
def test_a_user_of_its_own_where_there_are_no_namespaces_either():
    """What everyone may read and write is left open; without that there is no weaker jail."""
    weakness, _, can, passed = without([LANDLOCK, UNSHARE], lambda: probe(python=SYSTEM_PYTHON))
    (Path(tempfile.gettempdir()) / "left").unlink(missing_ok=True)
    assert "user of its own" in weakness and passed
    assert can in (["reads a file of everyone", "writes where everyone may", "works"],
                   ["reads a file of everyone", "reads a file of ours",
                    "writes where everyone may", "works"])   # where ours are everyone's
    assert common.describe_machine(torch.device("cpu")).endswith("threads")

    def as_nobody():
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        return refusal(weak=True, python=SYSTEM_PYTHON)
    assert "this machine gives neither" in without([LANDLOCK, UNSHARE], as_nobody)


@pytest.mark.skipif(
    not Path("/usr/include/asm-generic/unistd.h").exists(), reason="needs the kernel's headers"
)
def test_system_call_numbers():
    """The table against the kernel's own, of both machines."""
    import re

    headers = {
        0: "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        1: "/usr/include/asm-generic/unistd.h",
    }
    numbers = jail.ALLOWED | {name: numbers for name, (numbers, _, _) in jail.CHECKED.items()}
    for column, path in headers.items():
        if not Path(path).exists():
            continue
        known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", Path(path).read_text()))
        for name, pair in numbers.items():
            wanted = known.get({"newfstatat": "fstatat"}.get(name, name) if column else name)
            assert pair[column] == (wanted and int(wanted)) or name == "time", (name, pair, wanted)
