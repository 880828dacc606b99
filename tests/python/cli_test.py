#!/usr/bin/env python3
"""The command: what each subcommand prints, its exit codes, its one-line errors, and that a failure destroys nothing."""
import array
import json
import os
import pathlib
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

SOURCE = pathlib.Path(os.environ.get("FOURMOE_SOURCE", pathlib.Path(__file__).parents[2]))
COMMAND = os.environ.get("FOURMOE_COMMAND", str(SOURCE / "build" / "fourmoe"))
TINY = SOURCE / "examples" / "tiny-moe"
FIXTURES = SOURCE / "tests" / "fixtures"
COMMANDS = ("inspect", "run", "quantize", "verify", "explain", "bench", "tune", "support")
HIDDEN, EXPERTS, TOP_K = 128, 32, 4

sys.path.insert(0, str(SOURCE / "scripts"))
import tensors as files  # noqa: E402


def fourmoe(*arguments, **environment):
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})


def write(path, **tensors):
    """A safetensors file of (dtype, shape, bytes)."""
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + body)


def floats(rows, cols, scale=1.0):
    return "F32", [rows, cols], array.array("f", [scale * ((i * 37) % 101 - 50) / 50 for i in range(rows * cols)]).tobytes()


class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.scratch = pathlib.Path(scratch.name)
        self.input, self.output = self.scratch / "x.safetensors", self.scratch / "y.safetensors"

    def succeeds(self, *arguments, **environment):
        done = fourmoe(*arguments, **environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr, "")  # progress is for terminals
        return done.stdout

    def refuses(self, code, words, *arguments, **environment):
        done = fourmoe(*arguments, **environment)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        self.assertRegex(done.stderr, r"\Afourmoe: [^\n]*\n\Z")
        self.assertIn(words, done.stderr)
        return done

    def object_of(self, *arguments):
        return json.loads(self.succeeds(*arguments, "--json"))

    def listing(self):
        return sorted(p.relative_to(self.scratch) for p in self.scratch.rglob("*"))


class Usage(Case):
    def test_help_is_everywhere_and_has_an_example(self):
        for command in COMMANDS:
            text = self.succeeds(command, "--help")
            self.assertIn(f"fourmoe {command}", text)
            self.assertIn("Example", text)
            self.assertIn(command, self.succeeds("--help"))

    def test_version(self):
        self.assertRegex(self.succeeds("--version"), r"\Afourmoe \d+\.\d+\.\d+\n\Z")

    def test_wrong_usage_is_code_2_and_one_line(self):
        self.refuses(2, "there is no command 'frob'; see fourmoe --help", "frob")
        self.refuses(2, "subcommand is required")
        self.refuses(2, "path is required; see fourmoe run --help", "run")
        self.refuses(2, "--layer: 'x' is not a number", "run", "a", "--layer", "x")
        self.refuses(2, "--threads: '-1' is not a number from 0", "verify", "a", "--threads", "-1")
        self.refuses(2, "gpu not in {auto,sm90,cpu,reference}", "verify", "a", "--backend", "gpu")
        self.refuses(2, "w8a8 not in", "explain", "a", "--precision", "w8a8")
        self.refuses(2, "--tokens: '0' is not a number", "bench", "--shape", "tiny", "--tokens", "1,0")
        self.refuses(2, "either PATH or --shape", "explain")
        self.refuses(2, "either PATH or --shape; see fourmoe bench --help", "bench")
        self.refuses(2, "excludes", "explain", "a", "--shape", "tiny")
        self.refuses(2, "neither H,I,E,k nor one of", "bench", "--shape", "1,2,3")

    def test_a_closed_standard_output_is_a_failure(self):
        failed = (1, "fourmoe: write_failed: standard output cannot be written\n")
        for word in ("support", "--help", "--version"):
            with open("/dev/full", "w") as full:
                done = subprocess.run([COMMAND, word], stdout=full, stderr=subprocess.PIPE, text=True)
            self.assertEqual((done.returncode, done.stderr), failed)

    def test_a_closed_standard_error_changes_no_exit_code(self):
        with open("/dev/full", "w") as full:
            for code, arguments in ((1, ("inspect", self.scratch / "absent")), (2, ("frob",)), (2, ("inspect",))):
                done = subprocess.run([COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=full)
                self.assertEqual((done.returncode, done.stdout), (code, b""))


class Inspect(Case):
    def test_the_trained_model(self):
        text = self.succeeds("inspect", TINY / "nvfp4")
        for words in ("qwen3_moe", "modelopt", "nvfp4", "0-3", "softmax, renormalised"):
            self.assertIn(words, text)
        info = self.object_of("inspect", TINY / "nvfp4")
        self.assertEqual(len(info["layers"]), 4)
        problem = info["layers"][3]["problem"]
        self.assertEqual((problem["hidden"], problem["inter"], problem["experts"], problem["top_k"]), (128, 64, 32, 4))

    def test_every_fixture(self):
        for path in [p.parent for p in FIXTURES.glob("*/config.json")] + list(FIXTURES.glob("*.gguf")):
            self.succeeds("inspect", path)
            self.assertTrue(self.object_of("inspect", path)["layers"], path)

    def test_oddities_are_told(self):
        self.assertIn("gate and up globals differ", self.succeeds("inspect", FIXTURES / "modelopt-qwen3"))
        layer = self.object_of("inspect", FIXTURES / "modelopt-qwen3")["layers"][0]
        self.assertEqual(layer["oddities"]["gate_up_differ"], 2)

    def test_global_scales_that_no_layer_runs_with_are_told(self):
        copy = self.scratch / "copy"
        shutil.copytree(TINY / "nvfp4", copy)
        model = copy / "model.safetensors"
        tensors = {name: (entry["dtype"], entry["shape"], data) for name, (entry, data) in files.read(model).items()}
        tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_2"] = "F32", [], struct.pack("<f", float("nan"))
        write(model, **tensors)
        self.assertIn("1 global scales not finite and positive", self.succeeds("inspect", copy))
        layers = self.object_of("inspect", copy)["layers"]
        self.assertEqual([layer["oddities"]["globals_invalid"] for layer in layers], [0, 1, 0, 0])

    def test_control_characters_of_a_file_do_not_reach_the_terminal(self):
        copy = self.scratch / "copy"
        shutil.copytree(TINY / "nvfp4", copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "model_type": "a\x1b[2J\nb"}))
        self.assertIn("a\\x1b[2J\\x0ab\n", self.succeeds("inspect", copy))
        write(self.input, **{"a\x1b[2J": floats(1, 1)})
        self.refuses(1, "it has a\\x1b[2J\n", "run", TINY / "nvfp4", "--layer", 0, "--input", self.input, "--output",
                     self.output)

    def test_what_is_not_a_checkpoint(self):
        self.refuses(1, "file_unreadable", "inspect", self.scratch / "absent")
        self.input.write_bytes(b"\xff" * 100)
        self.refuses(1, "fourmoe: file_", "inspect", self.input)


class Run(Case):
    def arguments(self, *more, layer=0, model=TINY / "nvfp4"):
        return ("run", model, "--layer", layer, "--input", self.input, "--output", self.output, *more)

    def captured(self, layer=0):
        files.take(TINY / "capture.safetensors", self.input, f"layer{layer}.hidden_states=hidden_states")

    def error(self, expected, layer=0):
        ours = files.values(*files.read(self.output)["output"])
        theirs = files.values(*files.read(TINY / "capture.safetensors")[f"layer{layer}.{expected}"])
        return (sum((a - b) ** 2 for a, b in zip(ours, theirs)) / sum(b * b for b in theirs)) ** 0.5

    def test_the_checkpoints_router_picks(self):
        for layer in range(4):
            self.captured(layer)
            text = self.succeeds(*self.arguments(layer=layer))
            for words in ("cpu", "rel-L2", ": ok", "tokens/s", "router of the checkpoint", "0 not finite"):
                self.assertIn(words, text)
            self.assertEqual(files.read(self.output)["output"][0]["dtype"], "BF16")
            self.assertLess(self.error("output_w4a16", layer), 3e-3)

    def test_w4a4(self):
        self.captured()
        report = self.object_of(*self.arguments("--precision", "w4a4", "--threads", "1"))
        self.assertEqual((report["threads"], report["problem"]["precision"]), (1, "w4a4"))
        self.assertLess(self.error("output_w4a4"), 1e-2)
        self.assertLess(self.error("output_w4a4"), self.error("output_w4a16"))

    def test_w4a8_int8(self):
        self.captured(1)
        report = self.object_of(*self.arguments("--precision", "w4a8_int8", layer=1))
        self.assertEqual((report["check"]["passed"], report["problem"]["precision"]), (True, "w4a8_int8"))
        self.assertTrue(5e-3 < self.error("output_w4a16", 1) < 2e-2, self.error("output_w4a16", 1))

    def test_logits_and_picks_give_what_the_router_gives(self):
        self.captured()
        self.succeeds(*self.arguments("--picks"))
        first = files.read(self.output)
        self.assertEqual({name: entry["dtype"] for name, (entry, _) in first.items()},
                         {"output": "BF16", "topk_ids": "I32", "topk_weights": "F32"})
        hidden = files.read(self.input)["hidden_states"]
        given = {name: (entry["dtype"], entry["shape"], data) for name, (entry, data) in
                 {**first, "hidden_states": hidden}.items() if name != "output"}
        write(self.input, **given)
        self.succeeds(*self.arguments())
        self.assertEqual(files.read(self.output)["output"][1], first["output"][1])
        files.take(TINY / "capture.safetensors", self.input, "layer0.hidden_states=hidden_states",
                   "layer0.router_logits=router_logits")
        self.assertIn("router_logits", self.succeeds(*self.arguments()))
        self.assertLess(self.error("output_w4a16"), 3e-3)

    def test_other_dtypes_wide_ids_and_no_tokens(self):
        ids = "I64", [3, TOP_K], array.array("q", [0, -1, 31, 0] * 3).tobytes()
        write(self.input, hidden_states=floats(3, HIDDEN), topk_ids=ids, topk_weights=floats(3, TOP_K))
        self.assertEqual(self.object_of(*self.arguments())["active_experts"], 2)
        self.assertEqual(files.read(self.output)["output"][0]["dtype"], "F32")
        write(self.input, hidden_states=("F16", [2, HIDDEN], b"\0\x3c" * 2 * HIDDEN))
        self.succeeds(*self.arguments())
        self.assertEqual(files.read(self.output)["output"][0]["dtype"], "F16")
        write(self.input, hidden_states=("BF16", [0, HIDDEN], b""))
        self.assertEqual(self.object_of(*self.arguments())["tokens"], 0)
        self.assertEqual(files.read(self.output)["output"][0]["shape"], [0, HIDDEN])

    def test_every_dialect_agrees_with_its_reference(self):
        for name, layer in (("qwen3", 0), ("nemotron", 1), ("llama4", 0), ("gpt-oss", 0), ("mixtral", 0), ("stacked", 1)):
            folder = FIXTURES / f"modelopt-{name}"
            hidden = self.object_of("inspect", folder)["layers"][0]["problem"]["hidden"]
            write(self.input, hidden_states=floats(5, hidden, 0.3))
            for precision in ("w4a16", "w4a4", "w4a8_int8"):
                report = self.object_of(*self.arguments("--precision", precision, layer=layer, model=folder))
                self.assertEqual((report["check"]["passed"], report["check"]["tokens"]), (True, 5), name)

    def test_backends_and_levels_agree(self):
        self.captured()
        outputs = {}
        for level in ("portable", "avx2", "avx512", "vnni", "amx", ""):
            done = fourmoe(*self.arguments("--backend", "cpu"), FOURMOE_CPU_LEVEL=level)
            if "instruction_missing" in done.stderr:
                continue
            self.assertEqual(done.returncode, 0, done.stderr)
            outputs[level] = self.error("output_w4a16")
        report = self.object_of(*self.arguments("--backend", "reference", "--check", "0"))
        self.assertEqual((report["backend"], report["check"]), ("reference", None))
        self.assertLess(max(outputs.values()), 3e-3)
        self.refuses(1, "FOURMOE_CPU_LEVEL=neon", *self.arguments(), FOURMOE_CPU_LEVEL="neon")
        self.refuses(1, "FOURMOE_MEMORY=near", *self.arguments(), FOURMOE_MEMORY="near")
        self.refuses(1, "FOURMOE_AFFINITY=1", *self.arguments(), FOURMOE_AFFINITY="1")

    def test_memory_and_affinity_change_no_bit(self):
        self.captured()
        self.succeeds(*self.arguments())
        plain = self.output.read_bytes()
        self.succeeds(*self.arguments(), FOURMOE_MEMORY="interleave", FOURMOE_AFFINITY="cores")
        self.assertEqual(self.output.read_bytes(), plain)

    def fails(self, words, *arguments):
        """Refused with code 1; what lay at the output stays."""
        self.output.write_text("precious")
        before = self.listing()
        self.refuses(1, words, *(arguments or self.arguments()))
        self.assertEqual(self.output.read_text(), "precious")
        self.assertEqual(self.listing(), before)

    def test_wrong_inputs_are_named_and_nothing_is_written(self):
        write(self.input, other=floats(1, 1))
        self.fails("has no tensor hidden_states; it has other")
        write(self.input, hidden_states=floats(2, HIDDEN + 1))
        self.fails("hidden_states is [2, 129], expected [2, 128]")
        write(self.input, hidden_states=("F32", [1 << 50, 0], b""))
        self.fails("hidden_states is [1125899906842624, 0], expected")
        write(self.input, hidden_states=("F32", [2, 1, HIDDEN], b"\0" * 8 * HIDDEN))
        self.fails("expected a matrix")
        write(self.input, hidden_states=("I32", [2, HIDDEN], b"\0" * 8 * HIDDEN))
        self.fails("dtype_unsupported: hidden_states is i32")
        write(self.input, hidden_states=floats(2, HIDDEN), topk_ids=("I32", [2, TOP_K], b"\0" * 8 * TOP_K))
        self.fails("topk_ids and topk_weights go together")
        write(self.input, hidden_states=floats(2, HIDDEN), router_logits=floats(2, EXPERTS - 1))
        self.fails("router_logits")
        write(self.input, hidden_states=floats(2, HIDDEN), topk_ids=("I32", [2, TOP_K], b"\x20\0\0\0" * 2 * TOP_K),
              topk_weights=floats(2, TOP_K))
        self.fails("pick_out_of_range")
        self.input.write_bytes(b"not safetensors")
        self.fails("file_malformed")

    def test_the_checkpoint_is_never_the_output(self):
        copy = self.scratch / "copy"
        shutil.copytree(TINY / "nvfp4", copy)
        self.captured()
        for path in (copy, copy / "model.safetensors"):
            for name in ("config.json", "model.safetensors"):
                self.refuses(1, "file of the checkpoint", "run", path, "--layer", 0, "--input", self.input, "--output",
                             copy / name)
        self.assertEqual((copy / "config.json").read_bytes(), (TINY / "nvfp4" / "config.json").read_bytes())
        self.refuses(1, "folder does not exist", "run", copy, "--layer", 0, "--input", self.input, "--output",
                     self.scratch / "no" / "y.safetensors")
        self.refuses(1, "would be taken for one", "run", copy, "--layer", 0, "--input", self.input, "--output",
                     copy / "new.safetensors")

    def test_no_part_of_the_checkpoint_is_the_output(self):
        self.captured()
        cut, linked, blob = self.scratch / "cut", self.scratch / "linked", self.scratch / "blob"
        shards = [cut / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for folder in (cut, linked):
            shutil.copytree(TINY / "nvfp4", folder)
        shutil.move(cut / "model.safetensors", shards[0])
        shutil.copy(shards[0], shards[1])
        shutil.move(linked / "model.safetensors", blob)
        (linked / "model.safetensors").symlink_to("../blob")
        before = blob.read_bytes()
        for path, output in ((shards[0], shards[1]), (linked, blob), (linked / "model.safetensors", blob)):
            self.refuses(1, "file of the checkpoint", "run", path, "--layer", 0, "--input", self.input, "--output",
                         output)
            self.refuses(1, "file of the checkpoint", "bench", path, "--tokens", 1, "--seconds", 0, "--output", output)
            self.assertEqual(output.read_bytes(), before)
        # A file beside one that is whole in itself is none of its parts: the second run replaces the first one's.
        for _ in range(2):
            self.succeeds("run", shards[0], "--layer", 0, "--input", self.input, "--output", cut / "y.safetensors")

    def test_a_link_is_never_the_output(self):
        self.captured()
        link, target = self.scratch / "link.safetensors", self.scratch / "target.safetensors"
        link.symlink_to(target)
        for command in (("run", TINY / "nvfp4", "--layer", 0, "--input", self.input),
                        ("bench", "--shape", "64,32,4,2", "--tokens", 1, "--seconds", 0)):
            self.refuses(1, "is a link", *command, "--output", link)
            self.refuses(1, "is a link", *command, "--output", "/dev/stdout")
        self.assertTrue(link.is_symlink() and not target.exists())

    def test_a_file_beyond_its_limit(self):
        self.captured()
        done = subprocess.run([COMMAND, "run", TINY / "nvfp4", "--layer", "0", "--input", self.input, "--output",
                               self.output], capture_output=True, text=True, timeout=60,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)))
        self.assertEqual((done.returncode, "File too large" in done.stderr), (1, True), done.stderr)
        self.assertEqual([path.name for path in self.scratch.iterdir()], [self.input.name])

    def test_wrong_paths(self):
        self.captured()
        self.fails("layer_missing", *self.arguments(layer=4))
        self.fails("file_unreadable", *self.arguments(model=self.scratch / "absent"))
        same = ("run", TINY / "nvfp4", "--layer", 0, "--input", self.input, "--output")
        before = self.input.read_bytes()
        (self.scratch / "link").symlink_to(self.input)
        self.refuses(1, "is the input", *same, self.input)
        self.refuses(1, "is the input", *same, self.scratch / "link")
        self.assertEqual(self.input.read_bytes(), before)
        self.refuses(1, "is a file of the checkpoint", *same, TINY / "nvfp4" / "model.safetensors")
        self.refuses(1, "write_failed", *same, self.scratch / "no" / "folder.safetensors")
        (self.scratch / "loop").symlink_to("loop")
        self.refuses(1, "loop is a link", *same, self.scratch / "loop")
        self.refuses(1, "File name too long", *same, self.scratch / ("y" * 300))


class Quantize(Case):
    def quantize(self, source, out, *more):
        return "quantize", source, "--output", out, "--experts-only", *more

    def test_force_replaces_nothing_but_an_earlier_output(self):
        out = self.scratch / "models"
        (out / "llama").mkdir(parents=True)
        for name in ("a.gguf", "mine.pt", "llama/pytorch_model.bin", "b.safetensors"):
            (out / name).write_text("mine")
        before = self.listing()
        self.refuses(1, "not written by quantize", *self.quantize(TINY / "bf16", out, "--force"))
        self.assertEqual(self.listing(), before)
        earlier = self.scratch / "earlier"
        self.succeeds(*self.quantize(TINY / "bf16", earlier))
        for name in ("notes.txt", "adapter.safetensors"):
            (earlier / name).write_text("mine")
            self.refuses(1, name, *self.quantize(TINY / "bf16", earlier, "--force"))
            self.assertEqual((earlier / name).read_text(), "mine")
            (earlier / name).unlink()

    def test_links_of_a_hub_cache_are_files_of_the_checkpoint(self):
        blobs, snapshot = self.scratch / "hub" / "blobs", self.scratch / "hub" / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (blobs / "2").write_text("{}")
        for name, blob in (("config.json", "0"), ("model.safetensors", "1"), ("tokenizer.json", "2")):
            if not (blobs / blob).exists():
                (blobs / blob).write_bytes((TINY / "bf16" / name).read_bytes())
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
        out = self.scratch / "a" / "b" / "out"
        out.parent.mkdir(parents=True)
        self.succeeds(*self.quantize(snapshot, out))
        self.assertEqual(sorted(p.name for p in out.parent.parent.rglob("*") if p.is_file()),
                         ["config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"])
        self.assertFalse((out / "tokenizer.json").is_symlink())

    def test_a_plain_name_lands_in_the_current_folder(self):
        done = subprocess.run([COMMAND, *map(str, self.quantize(TINY / "bf16", "fresh"))], cwd=self.scratch,
                              capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertTrue((self.scratch / "fresh" / "model.safetensors").is_file())
        self.refuses(1, "is empty", *self.quantize(TINY / "bf16", ""))

    def test_a_promise_that_the_index_breaks_is_refused(self):
        source = self.scratch / "source"
        source.mkdir()
        names = files.read(TINY / "bf16" / "model.safetensors").keys()
        (source / "m.safetensors").write_bytes((TINY / "bf16" / "model.safetensors").read_bytes())
        (source / "config.json").write_bytes((TINY / "bf16" / "config.json").read_bytes())
        index = {"weight_map": {name: "m.safetensors" for name in [*names, "lm_head.weight"]}}
        (source / "m.safetensors.index.json").write_text(json.dumps(index))
        self.refuses(1, "lm_head.weight", *self.quantize(source, self.scratch / "out"))
        self.assertFalse((self.scratch / "out").exists())

    def test_a_lost_terminal_leaves_nothing_behind(self):
        for _ in range(3):
            run = subprocess.Popen([COMMAND, *map(str, self.quantize(TINY / "bf16", self.scratch / "out"))],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            run.send_signal(signal.SIGHUP)
            run.wait(60)
            self.assertEqual([p for p in self.scratch.iterdir() if p.name.startswith(".")], [])
            shutil.rmtree(self.scratch / "out", ignore_errors=True)

    def test_a_signal_that_is_ignored_stays_ignored(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            out = self.scratch / str(int(number))
            run = subprocess.Popen([COMMAND, *map(str, self.quantize(TINY / "bf16", out))], stdout=subprocess.DEVNULL,
                                   preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
            while run.poll() is None:
                run.send_signal(number)
                time.sleep(0.001)
            self.assertEqual(run.returncode, 0)
            self.assertTrue((out / "config.json").is_file())

    def test_the_trained_model_equals_modelopts_export(self):
        out = self.scratch / "out"
        text = self.succeeds("quantize", TINY / "bf16", "--output", out, "--experts-only")
        self.assertIn("W4A16_NVFP4", text)
        ours, theirs = files.read(out / "model.safetensors"), files.read(TINY / "nvfp4" / "model.safetensors")
        theirs = {name: value for name, value in theirs.items() if not name.endswith("input_scale")}
        self.assertEqual(ours.keys(), theirs.keys())
        for name, (entry, data) in theirs.items():
            self.assertEqual((ours[name][0]["dtype"], ours[name][1]), (entry["dtype"], data), name)
        self.assertEqual(self.object_of("inspect", out)["algorithm"], "W4A16_NVFP4")
        self.refuses(1, "file_exists", "quantize", TINY / "bf16", "--output", out, "--experts-only")
        report = self.object_of("quantize", TINY / "bf16", "--output", out, "--experts-only", "--force")
        self.assertEqual((report["layers"], report["matrices"]), (4, 384))

    def test_what_it_writes_runs(self):
        for name in ("deepseek_v3", "qwen2_moe", "mixtral"):
            out = self.scratch / name
            self.succeeds("quantize", FIXTURES / f"full-{name}" / "bf16", "--output", out)
            self.assertNotIn("FAILED", self.succeeds("verify", out))

    def test_refusals_write_nothing(self):
        self.refuses(1, "quantised already", "quantize", TINY / "nvfp4", "--output", self.scratch / "out")
        self.refuses(1, "must be apart", "quantize", TINY / "bf16", "--output", TINY / "bf16", "--force")
        self.refuses(1, "file_unreadable", "quantize", self.scratch / "absent", "--output", self.scratch / "out")
        self.refuses(2, "mxfp8 not in", "quantize", TINY / "bf16", "--output", self.scratch / "out", "--format", "mxfp8")
        self.assertEqual(self.listing(), [])

    def test_progress_is_one_line_on_a_terminal_and_is_erased(self):
        ours, theirs = pty.openpty()
        done = subprocess.run([COMMAND, "quantize", TINY / "bf16", "--output", self.scratch / "out", "--experts-only"],
                              stdout=subprocess.PIPE, stderr=theirs, timeout=60)
        os.close(theirs)
        seen = os.read(ours, 1 << 16).decode()
        os.close(ours)
        self.assertEqual(done.returncode, 0)
        self.assertTrue(seen.startswith("\rquantize  ") and seen.endswith("\r\x1b[K"), repr(seen))
        self.assertNotIn("\n", seen)


class Verify(Case):
    def test_the_trained_model(self):
        text = self.succeeds("verify", TINY / "nvfp4", "--layer", 2)
        for words in ("cpu.gemm1", "cpu.gemm2", "reference.gemm1", "w4a16", "w4a4", "w4a8_int8", "ok"):
            self.assertIn(words, text)
        self.assertNotIn("FAILED", text)
        report = self.object_of("verify", TINY / "nvfp4", "--layer", 2, "--backend", "cpu")
        self.assertTrue(report["passed"])
        self.assertEqual({step["step"] for step in report["steps"]}, {"cpu.gemm1", "cpu.gemm2"})
        self.assertGreaterEqual(len(report["steps"][0]["inputs"]), 8)
        self.assertEqual(min(case["tokens"] for case in report["steps"][0]["inputs"]), 0)

    def test_every_dialect(self):
        for path in (*FIXTURES.glob("modelopt-*"), FIXTURES / "ct-nvfp4", FIXTURES / "gpt-oss-mxfp4"):
            self.assertNotIn("FAILED", self.succeeds("verify", path))

    def test_a_missing_layer(self):
        self.refuses(1, "layer_missing", "verify", TINY / "nvfp4", "--layer", 9)

    def test_what_no_step_takes_has_a_reason_and_has_not_passed(self):
        copy = self.scratch / "copy"
        shutil.copytree(TINY / "nvfp4", copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 33}))
        self.refuses(1, "picks_unsupported: layer 0: top-k is 33, expected 1 to 32", "verify", copy)
        if not self.object_of("explain", "--shape", "tiny")["machine"]["devices"]:
            asked = ("verify", TINY / "nvfp4", "--device", "cuda:0", "--json")
            done = self.refuses(1, "no step could be verified", *asked)
            self.assertFalse(json.loads(done.stdout)["passed"])


class Explain(Case):
    def test_a_checkpoint_and_a_shape(self):
        self.assertIn("chosen", self.succeeds("explain", TINY / "nvfp4", "--tokens", 16))
        plan = self.object_of("explain", "--shape", "dsv3", "--tokens", 1)
        self.assertEqual((plan["problem"]["hidden"], plan["problem"]["experts"]), (7168, 256))
        self.assertGreater(plan["workspace_bytes"], 0)
        self.assertGreater(self.object_of("explain", "--shape", "dsv3")["workspace_bytes"], plan["workspace_bytes"])
        self.assertEqual(self.object_of("explain", "--shape", "64,32,4,2", "--backend", "reference")["plan"],
                         ["reference.whole"])
        self.assertEqual([(size["tokens"], size["by"]) for size in plan["sizes"]], [(1, "rule")])  # one way on the host

    def test_a_device_that_is_not_there(self):
        plan = self.object_of("explain", "--shape", "dsv3")
        steps = {step["step"]: step["reason"] for step in plan["steps"]}
        if plan["machine"]["devices"]:
            self.assertEqual(steps["sm90.gemm1"], "not_asked_for")
            return
        missing = "device_missing" if plan["machine"]["cuda"] else "not_built"
        self.assertEqual(steps["sm90.gemm1"], missing)
        self.refuses(1, missing, "explain", "--shape", "dsv3", "--device", "cuda:0")
        self.refuses(1, missing, "explain", "--shape", "dsv3", "--backend", "sm90")
        self.refuses(1, missing, "bench", "--shape", "tiny", "--tokens", 1, "--backend", "sm90")
        self.refuses(1, "argument_invalid", "explain", "--shape", "dsv3", "--backend", "sm90", "--device", "host")
        self.refuses(2, "neither host nor cuda:0", "explain", "--shape", "dsv3", "--device", "gpu")

    def test_a_refusal_says_what_would_pass_and_fails(self):
        done = self.refuses(1, "112 would pass", "explain", "--shape", "100,32,4,2", "--json")
        steps = json.loads(done.stdout)["steps"]
        self.assertEqual({step["reason"] for step in steps}, {"shape_unsupported"})
        self.refuses(1, "layer_missing", "explain", TINY / "nvfp4", "--layer", 4)


class Bench(Case):
    def test_a_table_with_shares_of_ceilings(self):
        text = self.succeeds("bench", "--shape", "64,32,4,2", "--tokens", "1,5", "--seconds", "0.01")
        for words in ("median us", "p10 us", "p90 us", "GB/s", "of read", "of peak", "fourmoe bench --shape 64,32,4,2"):
            self.assertIn(words, text)
        path = self.scratch / "bench.json"
        report = self.object_of("bench", TINY / "nvfp4", "--tokens", 3, "--seconds", "0.01", "--output", path)
        self.assertEqual(json.loads(path.read_text())["cases"], report["cases"])
        self.assertEqual([(c["tokens"], c["routing"]) for c in report["cases"]], [(3, "random"), (3, "skewed")])
        for case in report["cases"]:
            self.assertLessEqual(case["p10_us"], case["median_us"])
            self.assertLessEqual(case["median_us"], case["p90_us"])
            self.assertGreater(case["share_of_read"], 0)
        self.refuses(1, "write_failed", "bench", "--shape", "64,32,4,2", "--tokens", 1, "--seconds", 0, "--output",
                     self.scratch / "no" / "file")

    def test_the_record_replaces_no_device_and_no_checkpoint(self):
        copy = self.scratch / "copy"
        shutil.copytree(TINY / "nvfp4", copy)
        before = (copy / "config.json").read_bytes()
        asked = ("bench", copy, "--tokens", 1, "--seconds", 0, "--output")
        self.refuses(1, "is a file of the checkpoint", *asked, copy / "config.json")
        self.assertEqual((copy / "config.json").read_bytes(), before)
        os.mkfifo(self.scratch / "pipe")
        self.refuses(1, "is no file", *asked, self.scratch / "pipe")
        self.assertTrue((self.scratch / "pipe").is_fifo())

    def test_the_record_of_a_path_that_is_no_utf8(self):
        copy = self.scratch / os.fsdecode(b"m\xff")
        shutil.copytree(TINY / "nvfp4", copy)
        path = self.scratch / "bench.json"
        done = subprocess.run([COMMAND, "bench", copy, "--tokens", "1", "--seconds", "0", "--output", path],
                              capture_output=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertIn("m\ufffd", json.loads(path.read_text())["weights"])

    def test_other_encodings_and_forms(self):
        for shape in ("tiny",):
            for precision in ("w4a16", "w4a4", "w4a8_int8"):
                self.succeeds("bench", "--shape", shape, "--tokens", 2, "--seconds", 0, "--precision", precision)
        self.refuses(1, "shape_unsupported", "bench", "--shape", "65,32,4,2", "--tokens", 1)
        self.refuses(1, "calls of 1048576 tokens take", "bench", "--shape", "1048576,16,1,1", "--tokens", 1 << 20)

    def test_bench_counts_the_shared_expert_and_takes_logits(self):
        asked = ("bench", "--shape", "64,32,4,2", "--tokens", 1, "--seconds", 0)
        plain, shared = (self.object_of(*asked, *more)["cases"][0] for more in ((), ("--shared", "--logits")))
        self.assertEqual(2 * shared["bytes"], 3 * plain["bytes"])  # two picks, and the shared expert
        self.assertTrue(shared["command"].endswith("--shared --tokens 1 --backend auto --precision w4a16 --threads 0 "
                                                   "--seconds 0 --logits"), shared["command"])


class Tune(Case):
    def test_what_cannot_be_tuned_is_refused_before_anything_is_measured(self):
        self.refuses(2, "either PATH or --shape", "tune")
        self.refuses(2, "--tokens: '0' is not a number", "tune", "--shape", "tiny", "--tokens", "1,0")
        host = ("tune", "--shape", "tiny", "--tokens", 1, "--device", "host")
        self.refuses(1, "no file to store choices in", *host, FOURMOE_TUNING="")
        self.refuses(1, "the host's steps have one way", *host, "--output", self.scratch / "x.json")
        self.refuses(1, "the host's steps have one way", *host, "--dry-run")
        self.assertEqual(self.listing(), [])

    def test_without_a_gpu_it_says_so(self):
        machine = self.object_of("explain", "--shape", "tiny")["machine"]
        if not machine["devices"]:
            missing = "device_missing" if machine["cuda"] else "not_built"
            self.refuses(1, missing, "tune", "--shape", "tiny", "--tokens", 1, "--dry-run")

    def test_a_broken_file_of_choices_does_not_hurt(self):
        path = self.scratch / "tuning.json"
        path.write_text("{")
        self.succeeds("explain", "--shape", "tiny", FOURMOE_TUNING=str(path))
        self.succeeds("verify", TINY / "nvfp4", "--layer", 0, FOURMOE_TUNING=str(path))
        self.assertEqual(path.read_text(), "{")


class Support(Case):
    def test_the_table_does_not_depend_on_the_machine(self):
        table = self.succeeds("support", "--markdown")
        self.assertTrue(table.startswith("| step |"))
        self.assertEqual(table, self.succeeds("support", "--markdown", FOURMOE_CPU_LEVEL="portable"))
        self.assertEqual(len({line.count("|") for line in table.splitlines()}), 1)
        self.assertIn("reference.whole", self.succeeds("support"))


if __name__ == "__main__":
    unittest.main()
