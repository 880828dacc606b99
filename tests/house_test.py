#!/usr/bin/env python3
"""Checks the rules of the house (docs/design.md, section 2) and prints a table of sizes.

A broken rule is a line `file:line: what`, and the exit status is 1. The table never fails: it is for orientation.
Usage: house_test.py [root]
"""

import pathlib
import re
import subprocess
import sys

CODE = {".h", ".hpp", ".c", ".cc", ".cu", ".cuh"}
TEXT = CODE | {".py", ".sh", ".cmake", ".txt", ".toml", ".json", ".md", ".in", ".map", ".supp", ""}
FACES = ("bindings", "tools", "tests", "bench", "examples")
STAGES = ("route", "gemm1", "gemm2", "combine")
ROOMS = ("reference", "cpu", "sm90", "sm100", "sm120")
ROOM_NAMES = re.compile(r"(atom|tiles|whole)(_\w+)?|gemm1|gemm2")
TIERS = ("words", "contracts", "gpu", "bodies", "rooms", "plan", "faces")
WORDS = {"flow", "status", "machine", "executor", "workspace", "numa", "temporary"}
CONTRACTS = {"args.h", "weights/expert_table.h", "weights/quantise.h", "parallel/parallel.h", "parallel/arena.h"}
PLAN = {"plan", "layer", "residence", "residence_host", "residence_device"}
SAME_TIER_OPEN = ("gpu", "words", "contracts", "plan", "faces")  # elsewhere a file sees lower tiers and its own folder

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">]+)[">]', re.M)
ASSEMBLY = re.compile(r"\b(?:asm|__asm|__asm__)\s*(?:\(|volatile\b|__volatile__\b|goto\b|inline\b)")
LOUD = re.compile(r"(?<![\w.>])(?:v?f?printf|f?puts|f?putc|putchar|perror)\s*\("
                  r"|(?<![\w.>])(?:abort|_?exit|_Exit|quick_exit|terminate|assert)\s*\("
                  r"|\bstd::(?:cout|cerr|clog)\b|\bfmt::print\b|\b(?:stdout|stderr)\b")
ENVIRONMENT = re.compile(r"\b(?:secure_)?getenv\b|\benviron\b")
UNFINISHED = re.compile("TO" r"DO|FIX" r"ME|\bXX" r"X\b")
EMPTY_NAMES = {"util", "utils", "common", "helper", "helpers", "misc"}
MACHINE_PATH = re.compile(r"(?<![\w./$}~-])/(?:home|root|work)/")
NAMESPACE = re.compile(r"^[ \t]*(?:inline\s+)?namespace\s+(fourmoe(?:::\w+)*)\s*\{", re.M)
PIECES = (r"//[^\n]*|/\*.*?\*/|R\"(?P<end>\w*)\(.*?\)(?P=end)\""  # comments, raw strings, strings, characters
          r"|\"(?:\\.|[^\"\\\n])*\"|(?<!\w)'(?:\\.|[^'\\\n])+'")
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")


def list_files(root):
    """Paths of the project relative to root: what git knows or would add, else all that is not hidden or built."""
    try:
        command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard"]
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or one that belongs to somebody else
        names = [p.relative_to(root).as_posix() for p in root.rglob("*")]
        names = [n for n in names if not re.match(r"build\b|\.(?!ci/)", n) and "__pycache__" not in n]
    return sorted(n for n in names if (root / n).is_file())


def strip(text, keep_strings=False):
    """Text without comments (and the insides of strings), line numbers kept."""
    def blank(match):
        piece = match.group(0)
        if piece[0] == "/":
            return " " + "\n" * piece.count("\n")
        return piece if keep_strings else '""' + "\n" * piece.count("\n")
    return re.sub(PIECES, blank, text, flags=re.S)


def tier_of(path):
    """Tier of a source, as an index into TIERS; None for what no tier holds."""
    parts = path.split("/")
    if parts[0] in FACES:
        return TIERS.index("faces")
    if parts[0] != "src":
        return None
    inner = "/".join(parts[1:])
    folder, stem = parts[1], inner.split(".")[0]
    if len(parts) == 2 and stem in WORDS or folder == "format":
        return TIERS.index("words")
    if inner in CONTRACTS or folder in STAGES and path.endswith(".h"):
        return TIERS.index("contracts")
    if folder == "gpu":
        return TIERS.index("gpu")
    if folder in (*STAGES, "weights", "checkpoint", "parallel"):
        return TIERS.index("bodies")
    if folder == "backends" and len(parts) > 3:
        return TIERS.index("rooms")
    if len(parts) == 2 and stem in PLAN or stem == "backends/list" or folder == "tune":
        return TIERS.index("plan")
    return None


def resolve(files, path, target):
    """File that an include names, or None for what is not the project's."""
    folder = path.rsplit("/", 1)[0]
    for base in (folder, "src", "include", "tests", "tools", "bindings"):
        if f"{base}/{target}" in files:
            return f"{base}/{target}"
    return None


class House:
    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.files = list_files(self.root)
        self.known = set(self.files)
        self.findings = []
        self.texts = {}
        for path in self.files:
            if pathlib.PurePath(path).suffix in TEXT and not path.startswith("tests/fuzz/corpus/"):  # bytes of any kind
                self.texts[path] = (self.root / path).read_bytes().decode("utf-8", "replace")
        self.code = {p: strip(t) for p, t in self.texts.items() if pathlib.PurePath(p).suffix in CODE}

    def report(self, path, text, position, what):
        line = text.count("\n", 0, position) + 1
        self.findings.append(f"{path}:{line}: {what}")

    def check(self):
        for path in self.files:
            self.check_name(path)
        for path, text in self.texts.items():
            self.check_text(path, text)
        for path, code in self.code.items():
            self.check_includes(path, strip(self.texts[path], keep_strings=True))
            self.check_code(path, code)
        return self.findings

    def check_name(self, path):
        words = set(re.split(r"[/_.\-]", path.lower()))
        for word in sorted(words & EMPTY_NAMES):
            self.findings.append(f"{path}:1: a name with '{word}' says nothing")
        parts = path.split("/")
        if parts[0] != "src" or pathlib.PurePath(path).suffix not in CODE:
            return
        if tier_of(path) is None:
            self.findings.append(f"{path}:1: no tier of the house holds this file")
        if parts[1] == "backends" and len(parts) > 3:
            if parts[2] not in ROOMS:
                self.findings.append(f"{path}:1: unknown room '{parts[2]}'; rooms are {', '.join(ROOMS)}")
            if len(parts) > 4 or not ROOM_NAMES.fullmatch(parts[-1].split(".")[0]):
                self.findings.append(f"{path}:1: a room holds atom, tiles, gemm1, gemm2, whole and nothing else")

    def check_text(self, path, text):
        if path.endswith(".md"):
            for match in LINK.finditer(re.sub(r"```.*?```", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)):
                target = match.group(1).split("#")[0]
                if target and "://" not in target and not target.startswith("mailto:"):
                    if not (self.root / path).parent.joinpath(target).exists():
                        self.findings.append(f"{path}:1: link to '{target}', which is not there")
        elif not path.startswith("LICENSE"):
            odd = re.search(r"[^\x00-\x7f]", text)
            if odd:
                self.report(path, text, odd.start(), f"'{odd.group(0)}' is not ASCII")
            for match in UNFINISHED.finditer(text):
                self.report(path, text, match.start(), f"'{match.group(0)}' belongs in an issue")
        for match in MACHINE_PATH.finditer(text):
            self.report(path, text, match.start(), "a path of one machine")

    def check_includes(self, path, code):
        tier, folder = tier_of(path), path.rsplit("/", 1)[0]
        for match in INCLUDE.finditer(code):
            target = resolve(self.known, path, match.group(1))
            if target is None or target.rsplit("/", 1)[0] == folder and tier_of(target) == tier:
                continue
            if path.startswith("include/"):
                if not target.startswith("include/"):
                    self.report(path, code, match.start(), f"a public header includes '{target}'")
                continue
            seen = tier_of(target)
            if path.startswith("src/") and target.split("/")[0] != "src":
                self.report(path, code, match.start(), f"src includes '{target}'")
            elif tier is None or seen is None:
                continue
            elif seen > tier:
                self.report(path, code, match.start(), f"include goes up: {TIERS[tier]} -> {TIERS[seen]} ('{target}')")
            elif seen == tier and TIERS[tier] not in SAME_TIER_OPEN:
                self.report(path, code, match.start(), f"{TIERS[tier]} do not see each other ('{target}')")

    def check_code(self, path, code):
        if not path.startswith("src/gpu/isa/"):
            for match in ASSEMBLY.finditer(code):
                self.report(path, code, match.start(), "inline assembly outside src/gpu/isa")
        if path.startswith("src/"):
            for match in LOUD.finditer(code):
                self.report(path, code, match.start(), f"'{match.group(0)}' under src: return a Status or throw Error")
            self.check_namespace(path, code)
        if path != "src/machine.cc" and path.split("/")[0] in ("src", "bindings", "tools"):
            for match in ENVIRONMENT.finditer(code):
                self.report(path, code, match.start(), "environment variables are read in src/machine.cc only")

    def check_namespace(self, path, code):
        parts = path.split("/")[1:-1]
        own = "::".join(["fourmoe", *(parts[1:] if len(parts) > 1 and parts[0] == "backends" else parts)])
        for match in NAMESPACE.finditer(code):
            found = match.group(1) + "::"
            # Deeper is fine (fourmoe::cpu::avx2 in the cpu room), so is what lies above (forward declarations).
            if not found.startswith(own + "::") and not (own + "::").startswith(found):
                self.report(path, code, match.start(), f"namespace {match.group(1)} in the folder of {own}")


def find_functions(code):
    """Yields (lines, parameters, name, line) of each function body, found by its braces."""
    stack, head, opened = [], 0, {}
    for match in re.finditer(r"[{};]", code):
        mark, position = match.group(0), match.start()
        if mark == "{":
            before = code[head:position]
            inside = any(kind == "function" for kind in stack)
            name = re.search(r"([~\w:]+)\s*\(", before)
            control = re.search(r"\b(?:namespace|class|struct|union|enum|=)\s*[^()]*$", before)
            if name and not inside and not control:
                arguments = re.sub(r"<[^<>]*>|\([^()]*\)", "", before[name.end():].rsplit(")", 1)[0])
                count = arguments.count(",") + 1 if arguments.strip() else 0
                opened[len(stack)] = (name.group(1), count, position)
                stack.append("function")
            else:
                stack.append("other")
        elif mark == "}" and stack:
            if stack.pop() == "function" and len(stack) in opened:
                name, count, start = opened.pop(len(stack))
                line = code.count("\n", 0, start) + 1
                yield code.count("\n", start, position) + 1, count, name, line
        head = match.end()


def print_sizes(house, top=5):
    """The table of sizes: longest files, functions and parameter lists, and the most similar pairs of files."""
    code = {p: c for p, c in house.code.items() if p.split("/")[0] in ("src", "bindings", "tools")}
    lengths = sorted(((house.texts[p].count("\n"), p) for p in code), reverse=True)
    functions = sorted((f + (p,) for p, c in code.items() for f in find_functions(c)), reverse=True)
    lines = {p: {s for s in map(str.strip, c.splitlines()) if len(s) > 12} for p, c in code.items()}
    big = sorted(p for p in code if len(lines[p]) >= 20)
    pairs = sorted(((len(lines[a] & lines[b]) / min(len(lines[a]), len(lines[b])), a, b)
                    for i, a in enumerate(big) for b in big[i + 1:]), reverse=True)
    print(f"sizes of {len(code)} sources, {sum(n for n, _ in lengths)} lines (orientation, not a rule)")
    for count, path in lengths[:top]:
        print(f"  {count:5} lines       {path}")
    for count, _, name, line, path in functions[:top]:
        print(f"  {count:5} lines       {name}() at {path}:{line}")
    for _, count, name, line, path in sorted(functions, key=lambda f: -f[1])[:top]:
        print(f"  {count:5} parameters  {name}() at {path}:{line}")
    for share, a, b in pairs[:top]:
        print(f"  {100 * share:4.0f}% shared      {a}  {b}")


def main(root):
    house = House(root)
    findings = house.check()
    print_sizes(house)
    for finding in findings:
        print(finding, file=sys.stderr)
    print(f"house: {len(house.files)} files, {len(findings)} broken rules")
    return 1 if findings else 0


if __name__ == "__main__":
    default = pathlib.Path(__file__).resolve().parent.parent
    sys.exit(main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default))
