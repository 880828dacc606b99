"""Shows that each rule of house_test.py bites: a small tree that breaks it must give that finding and no other."""

import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import house_test  # noqa: E402

SOUND = {
    "README.md": "See [the map](src/flow.h) and [the web](https://example.org).\n",
    "src/flow.h": "#include <vector>\nnamespace fourmoe {}\n",
    "src/route/route.h": '#include "flow.h"\nnamespace fourmoe { struct Args; }\nnamespace fourmoe::route {}\n',
    "src/route/route.cc": '#include "route/route.h"\n// a comment may say printf("x") and asm("nop")\n',
    "src/gemm1/gemm1.h": '#include "route/route.h"\n',
    "src/backends/cpu/atom_avx2.h": "namespace fourmoe::cpu::avx2 {}\n",
    "src/backends/cpu/gemm1.cc": '#include "backends/cpu/atom_avx2.h"\n#include "gemm1/gemm1.h"\n',
    "src/backends/reference/gemm1.h": "namespace fourmoe::reference {}\n",
    "src/backends/list.cc": '#include "backends/reference/gemm1.h"\n#include "plan.h"\n',
    "src/plan.h": '#include "flow.h"\n',
    "src/machine.cc": 'const char* s = getenv("X");\nconst char* t = R"(a "quoted" abort())";\n',
    "src/gpu/isa/mma.cuh": 'inline void f() { asm volatile("nop;"); }\n',
    "include/fourmoe/fourmoe.h": "int fourmoe_version(void);\n",
    "bindings/c_api.cc": '#include "fourmoe/fourmoe.h"\n#include "plan.h"\n',
    "tests/case.h": '#include "plan.h"\n',
    "tools/main.cc": '#include "case.h"\nvoid print() { printf("x"); }\n',
}


def findings_of(changes):
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {**SOUND, **changes}.items():
            path = pathlib.Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return house_test.House(folder).check()


class Rules(unittest.TestCase):
    def bites(self, changes, *words):
        findings = findings_of(changes)
        self.assertEqual(len(findings), 1, findings)
        self.assertIn(next(iter(changes)), findings[0])
        for word in words:
            self.assertIn(word, findings[0])

    def test_a_sound_tree_has_no_findings(self):
        self.assertEqual(findings_of({}), [])

    def test_includes_go_down(self):
        self.bites({"src/flow.h": '\n#include "plan.h"\n'}, "words -> plan", ":2:")
        self.bites({"src/gemm1/gemm1.h": '#include "gpu/isa/mma.cuh"\n'}, "contracts -> gpu")
        self.bites({"src/gpu/ring.cuh": '#include "backends/cpu/atom_avx2.h"\n'}, "gpu -> rooms")
        self.bites({"src/route/route.cc": '#include "backends/list.cc"\n'}, "bodies -> plan")
        self.bites({"src/plan.h": '#include "case.h"\n'}, "src includes 'tests/case.h'")
        self.bites({"include/fourmoe/fourmoe.h": '#include "plan.h"\n'}, "public header")

    def test_folders_of_bodies_and_rooms_do_not_see_each_other(self):
        self.bites({"src/backends/cpu/gemm2.cc": '#include "backends/reference/gemm1.h"\n'}, "do not see each other")
        self.bites({"src/checkpoint/a.cc": '#include "weights/packed.h"\n', "src/weights/packed.h": ""}, "do not see")

    def test_rooms_hold_five_names(self):
        self.bites({"src/backends/cpu/threads.cc": ""}, "nothing else")
        self.bites({"src/backends/cpu/detail/gemm1.cc": ""}, "nothing else")
        self.bites({"src/backends/tpu/gemm1.cc": ""}, "unknown room")
        self.bites({"src/stray.cc": ""}, "no tier")

    def test_assembly_lives_in_isa(self):
        self.bites({"src/gpu/ring.cuh": 'inline void f() { asm volatile("nop;"); }\n'}, "inline assembly")
        self.bites({"tools/main.cc": 'void f() { __asm__("nop"); }\n'}, "inline assembly")

    def test_src_is_silent_and_never_ends_the_process(self):
        for call in ('printf("x")', 'std::printf("x")', 'fprintf(f, "x")', "std::abort()", "exit(1)", "assert(x)"):
            self.bites({"src/route/route.cc": f"void f() {{ {call}; }}\n"}, "under src")
        self.bites({"src/route/route.cc": "auto& out = std::cout;\n"}, "under src")
        self.assertEqual(findings_of({"src/route/route.cc": "void f() { snprintf(b, 1, 0); ring.exit(); }\n"}), [])

    def test_environment_is_read_in_one_place(self):
        self.bites({"src/plan.cc": 'auto x = std::getenv("X");\n'}, "machine.cc")
        self.bites({"tools/main.cc": 'auto x = getenv("X");\n'}, "machine.cc")

    def test_namespace_is_the_folder(self):
        self.bites({"src/route/route.cc": "namespace fourmoe::gemm1 {}\n"}, "fourmoe::route")
        self.bites({"src/backends/cpu/gemm2.cc": "namespace fourmoe::reference {}\n"}, "fourmoe::cpu")

    def test_sources_are_ascii_and_finished(self):
        self.bites({"src/route/route.cc": "// caf\u00e9\n"}, "not ASCII")
        self.bites({"src/route/route.cc": "// TO" "DO: later\n"}, "issue")
        self.bites({"src/route/route.cc": "// FIX" "ME\n"}, "issue")

    def test_names_say_something(self):
        self.bites({"src/format/util.h": ""}, "'util'")
        self.bites({"tools/row_helpers.cc": ""}, "'helpers'")

    def test_paths_of_one_machine_stay_out(self):
        self.bites({"docs/a.md": "run /ho" "me/me/x\n"}, "one machine")
        self.bites({"tools/a.sh": "cd /ro" "ot/x\n"}, "one machine")

    def test_links_resolve(self):
        self.bites({"docs/a.md": "[gone](../nothing.md#part)\n"}, "nothing.md")
        self.assertEqual(findings_of({"docs/a.md": "[up](../README.md#x) ![here](#y)\n"}), [])


class Sizes(unittest.TestCase):
    def test_functions_are_found_with_their_lengths_and_parameters(self):
        code = ("namespace a {\nstruct B {\n  int f(int x, std::pair<int, int> y) const {\n    if (x) { g(1, 2, 3); }\n"
                "    return 1;\n  }\n};\nvoid g() {}\n}\n")
        found = sorted((name, lines, count, line) for lines, count, name, line in house_test.find_functions(code))
        self.assertEqual(found, [("f", 4, 2, 3), ("g", 1, 0, 8)])


if __name__ == "__main__":
    unittest.main()
