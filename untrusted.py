"""What anyone may have made is data, never a program: read within bounds, and shown with care.

Files of a folder that comes from anywhere, answers of servers, addresses with passwords in them.
What cannot be read without running it is tried out first, by a process with limits:

    python -I untrusted.py SCRIPT BYTES_OF_MEMORY SECONDS [FOLDER OF PACKAGES…] < file

What is wrong with a file is a ValueError (or OSError) here; who knows its place makes the user's
line of it. docs/SECURITY.md says what is trusted and what is not. Standard library only.
"""
import io
import json
import os
import pickle
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path

MOST_JSON = 64 << 20      # bytes of a JSON file; parsed, it may take 28 times as many
# What call_apart's process prints where all went well. Its exit code would not do: a parent that
# ignores SIGCHLD always gets 0.
FINE = "fine"


def file_inside(folder: Path, name: str) -> Path:
    """The path of a regular file of a folder; ValueError for a name or a link that leads out of it.

    A link into the hub's cache is none: there, snapshots/<commit>/<name> are links into blobs/.
    """
    if not isinstance(name, str) or not name or name != os.path.basename(name) or "\0" in name:
        raise ValueError(f"{name!r:.100} is no name of a file in this folder")
    root, real = (Path(os.path.realpath(path)) for path in (folder, folder / name))
    if real.parent not in (root, root.parent.parent / "blobs"):
        raise ValueError(f"{name} is a link out of the folder: put the file itself there")
    if not real.exists():
        raise FileNotFoundError(f"{name} is missing")
    if not real.is_file():  # a pipe would be waited for
        raise ValueError(f"{name} is no regular file")
    return folder / name


def read_bytes(path: Path, most: int) -> bytes:
    """All of a file; ValueError where it has more bytes than it may."""
    with open(path, "rb") as f:
        data = f.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path.name} has more than {most >> 20} MB")
    return data


def read_json(folder: Path, name: str) -> dict:
    """What a JSON file of a folder holds; ValueError where it is no JSON object."""
    try:
        value = json.loads(read_bytes(file_inside(folder, name), MOST_JSON))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


class Unpickler(pickle._Unpickler):
    """Makes plain values and objects of some classes, so no function that a pickle names is called.

    In plain Python: the C one keeps its memo in a list as long as the largest number that the
    pickle says, gigabytes for six bytes. BYTEARRAY8, which nobody here writes, takes memory
    likewise.
    """
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items()
                if code != pickle.BYTEARRAY8[0]}

    def __init__(self, data: bytes, classes: dict[str, set[str]] = {}):
        """classes: module -> the names in it that may be used."""
        super().__init__(io.BytesIO(data))
        self.classes = classes

    def find_class(self, module: str, name: str):
        if name not in self.classes.get(module, ()):
            raise pickle.UnpicklingError(
                f"it names {module}.{name}: a program in place of data")
        return super().find_class(module, name)


# --------------------------------------------------------------------------------------------------
# What is tried out in a process of its own

def call_apart(script: Path, text: str, memory: int, seconds: int) -> str:
    """Why a process of its own could not call `main(text)` of a script; "" if it could.

    What ends that process is a message in this one. The script imports nothing of ours. memory:
    bytes of address space. seconds: of CPU time; ten times as many may pass.
    """
    # -I: nothing of the working folder is imported; it also hides the user's own packages, so where
    # ours come from is said.
    command = [sys.executable, "-I", __file__, str(script), str(memory), str(seconds),
               *filter(None, sys.path)]
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    try:
        child = subprocess.run(
            command, input=text.encode("utf-8", "replace"), capture_output=True,
            timeout=10 * seconds, start_new_session=True,  # so that Ctrl-C is not the file's fault
            env=kept | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    except subprocess.TimeoutExpired:
        return f"it did not come to an end in {10 * seconds} s"
    said = child.stdout.decode("utf-8", "replace")
    if said == FINE:
        return ""
    if said:
        return printable(said)
    reason = f"more than {memory >> 20} MB of memory, {seconds} s, or a crash"
    if child.returncode > 0:  # no signal: Python, or the loader, had something to say
        last_line = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        reason = printable(last_line) or reason
    return f"it ended the process that tried it (exit code {child.returncode}: {reason})"


def main() -> None:
    """The process: says FINE on standard output, or what went wrong."""
    script, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path += [folder for folder in sys.argv[4:] if folder not in sys.path]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        runpy.run_path(script)["main"](sys.stdin.buffer.read().decode())
    except BaseException as error:  # a PanicException of Rust is no Exception
        said = printable(str(error)) or type(error).__name__
    else:
        said = FINE
    sys.stdout.buffer.write(said.encode("utf-8", "replace"))


# --------------------------------------------------------------------------------------------------
# What is printed or kept

def mask_secrets(text: str) -> str:
    """A text without the passwords and keys that addresses in it hold."""
    text = re.sub(r"://[^/\s'\"]*@", "://***@", text)
    return re.sub(r"([?&][\w-]*(?:key|token|secret|password)=)[^&\s'\"]+", r"\1***", text,
                  flags=re.IGNORECASE)


def mask_values(value):
    """A JSON value with mask_secrets in all its texts. (Of JSON as one text it would make none.)"""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, (list, tuple)):
        return [mask_values(item) for item in value]
    if isinstance(value, dict):
        return {mask_values(key): mask_values(item) for key, item in value.items()}
    return value


def printable(text: str, most: int = 200) -> str:
    """What another program said, in one line, cut, and without signs that a terminal would obey."""
    line = " ".join(text[:10 * most].split())
    signs = [sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in line[:most]]
    return "".join(signs) + ("…" if len(line) > most else "")


if __name__ == "__main__":
    main()
