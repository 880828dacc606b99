"""The comparison with rivals: its routings are those of bench/sm90/gemms.cu, its tables say what the records say."""
import contextlib
import io
import itertools
import json
import os
import pathlib
import sys
import tempfile
import unittest

BENCH = pathlib.Path(os.environ["FOURMOE_SOURCE"]) / "bench"
sys.path += [str(BENCH / "rivals"), str(BENCH / "sm90")]
import case  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402

CEILINGS = {"part": "torch", "shape": "qwen3-30b", "copy_TBps": 4.0, "dense_bf16_TFLOPs": 500.0}
ROWS = [
    {"part": "device", "name": "a card"}, CEILINGS,
    {"part": "gemms", "shape": "qwen3-30b", "tokens": 8, "active": 50.0, "tile": -1, "gemm1_us": 60.0, "gemm2_us": 30.0,
     "both_us": 100.0, "TBps": 1.3, "TFLOPs": 6.0},
    {"part": "gemms", "shape": "qwen3-30b", "tokens": 8, "active": 50.0, "tile": 3, "gemm1_us": 50.0, "gemm2_us": 25.0,
     "both_us": 80.0, "TBps": 1.7, "TFLOPs": 7.5},
    {"part": "rivals", "shape": "qwen3-30b", "tokens": 8, "active": 50.0, "rows": 64, "absent": {"deepgemm_fp8": "no"},
     "us": {"ours": 100.0, "torch_bf16": 300.0, "humming_grouped": 90.0, "humming_indexed": 120.0}},
    {"part": "rivals", "shape": "qwen3-30b", "tokens": 8, "active": 50.0, "rows": 64, "absent": {}, "rested": True,
     "us": {"ours": 80.0, "humming_grouped": 160.0}},
]


def printed(function, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        function(*arguments)
    return out.getvalue()


class RoutingTest(unittest.TestCase):
    def test_words_are_those_of_the_standard_library(self):
        # ISO C++ [rand.predef]: the 10000th word of mt19937_64 with its default seed.
        self.assertEqual(next(itertools.islice(case.random_words(5489), 9999, None)), 9981545732273789042)

    def test_every_token_picks_top_k_experts(self):
        for shape in case.SHAPES.values():
            routing = case.route(shape, 5, 1)
            self.assertEqual(routing.rows, 5 * shape.top_k)
            self.assertEqual(sum(routing.counts), routing.rows)
            self.assertLessEqual(max(routing.counts), 5)
            self.assertEqual(routing.active, sum(count > 0 for count in routing.counts))

    def test_layers_differ(self):
        layers = case.routings(case.SHAPES["dsv3"], 8)
        self.assertEqual(len(layers), 8)
        self.assertEqual(len(set(layers)), 8)


class ReportTest(unittest.TestCase):
    def rows(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "record.json"
            path.write_text(json.dumps({"command": "a command", "rows": ROWS}))
            return report.read([path])["rows"]

    def test_table(self):
        def cells_of(rows):
            line = printed(report.print_table, rows, None).splitlines()[-1]
            return [cell.strip() for cell in line.strip("|").split("|")]
        cells = cells_of(self.rows())
        # 50 experts of 4.718592 M weights at 0.5625 bytes in 100 us: 1.327 TB/s; 64 rows: 6.04 TFLOP/s.
        self.assertEqual(cells[:8], ["qwen3-30b", "8", "50", "100.0", "1.33", "33%", "6", "1%"])
        self.assertEqual(cells[8:], ["0.90", "-", "-", "3.00", "-", "-", "-", "-", "-"])
        # A whole layer of 60 us beside Humming's 90.
        with_layer = [row | {"layer_us": 60.0} if row["part"] == "rivals" else row for row in self.rows()]
        self.assertEqual(cells_of(with_layer)[8:], cells[8:15] + ["60.0", "1.50"])

    def test_rested_rows_stand_apart(self):
        line = printed(report.print_table, self.rows(), None, True).splitlines()[-1]
        self.assertIn("| 80.0 |", line)
        self.assertIn("| 2.00 |", line)
        self.assertEqual(len(report.contests(self.rows())), 1)

    def test_the_first_record_of_a_shape_counts(self):
        older = [row for row in ROWS if not row.get("rested")] + [dict(ROWS[4], shape="dsv3", us={"ours": 7.0})]
        with tempfile.TemporaryDirectory() as folder:
            paths = [pathlib.Path(folder) / name for name in ("new.json", "old.json")]
            for path, rows in zip(paths, (ROWS, older)):
                path.write_text(json.dumps({"command": "x", "rows": rows}))
            rows = report.read(paths)["rows"]
        self.assertEqual([(row["shape"], row["run"]) for row in report.contests(rows)], [("dsv3", 1), ("qwen3-30b", 0)])
        self.assertEqual(len(report.contests(rows, rested=True)), 1)

    def test_losses_are_named(self):
        text = printed(report.print_extremes, self.rows())
        self.assertIn("slower than it: qwen3-30b T=8 (0.90)", text)

    def test_gemms_table_names_a_better_tile(self):
        text = printed(record.print_table, ROWS)
        self.assertIn("3 (+25%)", text)

    def test_gemms_rows_are_read_from_lines_too(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "rows"
            path.write_text("\n".join(map(json.dumps, ROWS)))
            self.assertEqual(record.read(path), ROWS)


if __name__ == "__main__":
    unittest.main()
