"""Whether the tests notice when the source is wrong: single mutations, each run against its tests.

    python tools/mutate.py                          a sample of all of src/packlight
    python tools/mutate.py _checks.py inverted      of one module and one folder
    python tools/mutate.py _checks.py --count 0     every mutant there is

A mutant differs from the source in one place: another comparison, `and` for `or`, a number off by
one, a deleted statement, `None` returned, two arguments exchanged. It is killed if a test fails.
The tests of a module are those of its name in the folder of its name, and those that import it;
where these say too little or take too long, TESTS names others. What survives is printed as a diff:
it asks for a test, or for a line in equivalent_mutants.toml that says why no test can tell.
What only a GPU runs (DEVICE) is counted and left out, unless `--gpu` has the tests run on one.

Sampled by `--seed`. Every mutant runs in a copy of the tree, so that the tree stays as it is.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import difflib
import functools
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "packlight"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.toml")
COPIED = ("src", "tests", "benchmarks", "docs", "tools", "pyproject.toml", "README.md", "Makefile")
WANTED = 0.9  # of those that are not equivalent

# Arguments of pytest for modules whose names do not lead to their tests.
TESTS = {
    "__main__.py": "tests/test_cli.py",
    "_library.py": "tests/test_library.py",
    "_overwrite.py": "tests/fewbit/test_pooling.py tests/inverted/test_norms.py",
    "_seed_kernels.py": "tests/groupquant/test_packs.py -k kernels_equal",
    "_swap.py": "tests/test_convert.py tests/test_classes.py",
    "_torch": "tests/test_torch.py tests/test_notes.py tests/test_saving.py",
    "_torch/attributes.py": "tests/test_torch.py tests/test_profile.py",
    "_torch/autograd.py": "tests/test_torch_questions.py tests/test_torch.py",
    "_torch/backends.py": "tests/test_torch_questions.py tests/test_torch.py",
    "_torch/fakes.py": "tests/test_predict.py tests/test_predict_modules.py",
    "_torch/graph.py": "tests/test_torch_questions.py tests/test_saving.py",
    "_torch/hooks.py": "tests/test_profile.py tests/test_saving.py",
    "_torch/modes.py": "tests/test_torch_questions.py tests/test_torch.py",
    "_tracer.py": "tests/test_compiled_resnet.py tests/groupquant/test_sharing.py",
    "cli": "tests/test_cli.py",
    "cli/command_line.py": "tests/test_cli.py tests/test_models.py",
    "cli/demo": "tests/test_demo.py",
    "cli/models": "tests/test_models.py",
    "conversion.py": "tests/test_convert.py tests/test_predict.py",
    "convert.py": "tests/test_convert.py tests/test_classes.py"
    " tests/test_own_method.py::test_a_method_that_is_no_value_is_refused",
    "elementwise": "tests/fewbit/test_kernels.py tests/inverted/test_activation_kernels.py"
    " tests/groupquant/test_kernels.py",
    "elementwise/functions.py": "tests/test_contract.py -k bit_equal",
    "fewbit/codebook": "tests/fewbit/test_codebook.py",
    "fewbit/method.py": "tests/fewbit/test_functional.py tests/test_convert.py",
    "fewbit/modules.py": "tests/test_contract.py tests/fewbit/test_functional.py -k fewbit",
    "fewbit/ops.py": "tests/test_operators.py",
    "fewbit/rules.py": "tests/test_rules.py tests/test_convert.py",
    "groupquant": "tests/groupquant",
    "groupquant/conv_modules.py": "tests/groupquant/test_modules.py"
    " tests/groupquant/test_convolution.py",
    "groupquant/fixed_point": "tests/groupquant/test_fixed_point.py"
    " tests/groupquant/test_residual.py",
    "groupquant/fixed_point/ops.py": "tests/test_operators.py tests/groupquant/test_fixed_point.py",
    "groupquant/fixed_point/residual_ops.py": "tests/test_operators.py"
    " tests/groupquant/test_residual.py",
    "layers/activations.py": "tests/test_contract.py tests/groupquant/test_modules.py"
    " tests/groupquant/test_sharing.py tests/test_calls.py tests/test_own_method.py -k '(groupquant"
    " and not kernel and not compiled and not checkpoint) or product or BlockFloat'",
    "groupquant/modules.py": "tests/groupquant/test_modules.py tests/groupquant/test_sharing.py"
    " tests/test_contract.py -k 'groupquant and not kernel'",
    "layers/norms.py": "tests/groupquant/test_modules.py tests/groupquant/test_limits.py"
    " tests/test_own_method.py tests/groupquant/test_sharing.py -k 'not compile and not"
    " checkpoint'",
    "layers/plain.py": "tests/test_twin.py tests/groupquant/test_modules.py",
    "groupquant/ops.py": "tests/test_operators.py",
    "groupquant/packs.py": "tests/groupquant/test_modules.py tests/groupquant/test_sharing.py -k"
    " 'not compiled and not checkpoint'",
    "layers/product.py": "tests/test_notes.py tests/test_calls.py -k 'product or gated or twice'",
    "groupquant/rules.py": "tests/test_rules.py tests/test_convert.py",
    "integrations": "tests/integrations",
    "integrations/_activations.py": "tests/integrations/test_timm.py"
    " tests/integrations/test_transformers.py",
    "integrations/transformers": "tests/integrations/test_transformers.py",
    "integrations/transformers/callback.py": "tests/integrations/test_trainer.py",
    "inverted/functional.py": "tests/inverted/test_activations.py tests/test_contract.py -k"
    " 'inverted or test_activations'",
    "inverted/method.py": "tests/test_convert.py",
    "inverted/modules.py": "tests/test_contract.py -k inverted",
    "inverted/norm_functions.py": "tests/inverted/test_norms.py tests/inverted/test_linear.py",
    "inverted/norm_modules.py": "tests/inverted/test_norm_weights.py tests/inverted/test_norms.py",
    "inverted/norm_ops.py": "tests/test_operators.py tests/inverted/test_norms.py",
    "inverted/ops.py": "tests/test_operators.py",
    "inverted/rules.py": "tests/test_rules.py tests/test_convert.py",
    "layers": "tests/test_own_method.py tests/groupquant/test_modules.py",
    "gradient_error": "tests/test_gradient_error.py",
    "layers/attention_backends.py": "tests/groupquant/test_attention_masks.py",
    "layers/attention.py": "tests/groupquant/test_attention.py"
    " tests/groupquant/test_attention_masks.py"
    " tests/test_own_method.py::test_what_a_layer_keeps_has_no_gradient",
    "layers/channel_norms.py": "tests/groupquant/test_batch_norm.py tests/test_own_method.py"
    " tests/groupquant/test_still_channels.py tests/groupquant/test_modules.py",
    "layers/convolution.py": "tests/groupquant/test_convolution.py",
    "layers/twin.py": "tests/test_twin.py tests/test_rules.py -k 'test_twin or BatchNorm'",
    "packing/layout.py": "tests/packing tests/fewbit/test_functional.py",
    "packing/ops.py": "tests/test_operators.py tests/packing/test_masks.py",
    "packing/reference.py": "tests/packing",
    "profile": "tests/test_profile.py",
    "profile/recording.py": "tests/test_profile.py",
    "report": "tests/test_profile.py tests/test_html.py",
    "report/gradients.py": "tests/test_gradient_error.py",
    "report/gradient_plotting.py": "tests/test_gradient_error.py",
    "report/gradient_printing.py": "tests/test_gradient_error.py",
    "report/page.py": "tests/test_html.py",
    "saving": "tests/test_saving.py",
    "saving/__init__.py": "tests/test_saving.py",
    "saving/activations.py": "tests/test_saving_precision.py",
    "saving/norms.py": "tests/test_saving_precision.py",
    "saving/packing.py": "tests/test_saving_precision.py tests/test_saving.py",
    "selectors.py": "tests/test_convert.py",
    "sharing.py": "tests/test_notes.py tests/groupquant/test_sharing.py -k 'not near_the_exact and"
    " not checkpoint and not compiled_layers and not compiled_gradients'",
    "sketch": "tests/sketch",
    "sketch/ops.py": "tests/test_operators.py tests/sketch/test_kernels.py",
}

# How definitions, statements and expressions begin that no test runs without a GPU.
DEVICE = {
    "cli/demo/settings.py": ['{"steps": 400,'],
    "layers/attention_backends.py": [
        "int(heads // groups)",
        "elif backend == SDPBackend.FLASH_ATTENTION.value:",
        "if backend == SDPBackend.EFFICIENT_ATTENTION.value:",
        "if backend == SDPBackend.FLASH_ATTENTION.value:",
        "return out, [*tensors[:3], *tensors[5:7]]",
    ],
}

# --- What is changed.


@dataclasses.dataclass(frozen=True)
class Mutant:
    module: str  # relative to SOURCE
    start: int  # offsets into the source, in bytes, as ast counts columns
    end: int
    text: str
    on_device: bool = False  # only a GPU runs it

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def lines(self, source: bytes) -> tuple[str, str]:
        """The lines that change, before and after."""
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        before = source[first:last]
        after = source[first : self.start] + self.text.encode() + source[self.end : last]
        return before.decode().strip(), after.decode().strip()


COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "|",
}  # fmt: skip
# Functions of which the order of arguments is of no account.
UNORDERED = ("are_one", "equal", "mark_non_differentiable", "max", "maximum", "min", "minimum")


class _Mutations(ast.NodeVisitor):
    """All mutants of one module.

    Annotations, decorators, docstrings and messages of errors are left alone.
    """

    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source, self.found = module, source, list[Mutant]()
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.device, self.on_device = set(DEVICE.get(module, ())), False
        self.unseen = set(self.device)

    def visit(self, node: ast.AST) -> None:
        before = self.on_device
        if self.device and hasattr(node, "lineno"):
            line = self.source[self._span(node)[0] : self.starts[node.lineno]].decode()
            begun = {beginning for beginning in self.device if line.startswith(beginning)}
            self.on_device |= bool(begun)
            self.unseen -= begun
        super().visit(node)
        self.on_device = before

    def _span(self, node: ast.AST) -> tuple[int, int]:
        begin = self.starts[node.lineno - 1] + node.col_offset
        return begin, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        begin, end = self._span(node)
        return self.source[begin:end].decode()

    def _put(self, node: ast.AST, text: str) -> None:
        self._replace(*self._span(node), text)

    def _replace(self, begin: int, end: int, text: str) -> None:
        self.found.append(Mutant(self.module, begin, end, text, self.on_device))

    def _between(self, left: ast.AST, right: ast.AST, text: str) -> None:
        """Puts another operator between two operands, outside their parentheses."""
        begin, end = self._span(left)[1], self._span(right)[0]
        gap = self.source[begin:end]
        closing = len(gap) - len(gap.lstrip(b") \n"))
        operator = re.match(rb"[^\s(#\\]+(?: not\b| in\b)?", gap[closing:])
        if operator is not None:
            begin += closing
            self._replace(begin, begin + operator.end(), text)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            self._between(left, right, COMPARISONS[type(operator)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = "or" if isinstance(node.op, ast.And) else "and"
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, other)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        strings = (ast.JoinedStr, ast.Constant)
        text = isinstance(node.left, strings) and isinstance(getattr(node.left, "value", ""), str)
        if type(node.op) in OPERATORS and not text:
            self._between(node.left, node.right, OPERATORS[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self._put(node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._put(node, str(not node.value))
        elif isinstance(node.value, int):
            self._put(node, str(node.value + 1))
            self._put(node, str(node.value - 1))
        elif isinstance(node.value, float):
            self._put(node, f"({self._text(node)} * 1.25 + 0.125)")

    def visit_If(self, node: ast.If) -> None:
        self._put(node.test, f"(not ({self._text(node.test)}))")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._put(node.test, f"(not ({self._text(node.test)}))")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        first, second = [*node.args[:2], None, None][:2]
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        exchangeable = second is not None and not isinstance(first, ast.Starred)
        exchangeable &= name not in UNORDERED
        if exchangeable and self._text(first) != self._text(second):
            begin, end = self._span(first)[0], self._span(second)[1]
            between = self.source[self._span(first)[1] : self._span(second)[0]].decode()
            exchanged = self._text(second) + between + self._text(first)
            self._replace(begin, end, exchanged)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        constant = isinstance(node.value, ast.Constant)  # None for False is the same to a caller
        if node.value is not None and not (constant and node.value.value in (None, False, True)):
            self._put(node.value, "None")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._put(node, "pass")  # what its message says is not looked into

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self._put(node, "pass")
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._put(node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Attribute | ast.Subscript):
            self._put(node, "pass")
        if getattr(node.targets[0], "id", "") != "__all__":
            self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of zip: an assertion
            self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in node.body:
            self.visit(part)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass


def mutants(module: str) -> list[Mutant]:
    source = (SOURCE / module).read_bytes()
    visitor = _Mutations(module, source)
    visitor.visit(ast.parse(source))
    if visitor.unseen:
        sys.exit(f"nothing in {module} begins with {' or '.join(visitor.unseen)}; see DEVICE")
    return visitor.found


# --- What must notice.


@functools.cache
def imported(path: Path) -> set[str]:
    """Names of the modules that a test imports, with those that it may import from packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@functools.cache
def tests_of(module: str) -> list[str]:
    """Arguments of pytest: those that TESTS has, the module's own tests, else who imports it."""
    path = Path(module)
    if module in TESTS:
        return shlex.split(TESTS[module])
    name = ".".join(("packlight", *path.with_suffix("").parts)).removesuffix(".__init__")
    own, importing = [], []
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = str(test.relative_to(ROOT))
        same_folder = test.parent == ROOT / "tests" / path.parent
        if same_folder and re.fullmatch(rf"test_{path.stem.strip('_')}(_\w+)?", test.stem):
            own.append(relative)
        elif name in imported(test):
            importing.append(relative)
    folders = [TESTS[folder] for parent in path.parents if (folder := str(parent)) in TESTS]
    return own or importing or shlex.split(" ".join(folders[:1]))


# --- Running.


def copy_tree(folder: Path) -> None:
    for name in COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / name)


def passes(folder: Path, tests: list[str], limit: float | None = None) -> bool:
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "src"),
        # A mutant may have the size and the second of the one before, and Python asks no more.
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    run = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return run.wait(limit) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if run.poll() is None:
            os.killpg(run.pid, 9)
            run.wait()


def known(listed: list[dict[str, str]], mutant: Mutant, source: bytes) -> bool:
    before, after = mutant.lines(source)
    return any(
        (entry["module"], entry["line"], entry["mutant"]) == (mutant.module, before, after)
        for entry in listed
    )


def difference(mutant: Mutant, source: bytes) -> str:
    lines = (text.decode().splitlines() for text in (source, mutant.apply(source)))
    return "\n".join(difflib.unified_diff(*lines, mutant.module, mutant.module, n=2, lineterm=""))


def chosen(modules: list[str]) -> Iterator[str]:
    for path in sorted(SOURCE.rglob("*.py")):
        module = str(path.relative_to(SOURCE))
        if not modules or any(module == m or module.startswith(f"{m}/") for m in modules):
            yield module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "modules", nargs="*", help="files and folders of src/packlight; all if none"
    )
    parser.add_argument("--count", type=int, default=60, help="mutants; 0 for all there are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--gpu", action="store_true", help="run the tests on a CUDA device")
    options = parser.parse_args()
    gpu = ["--gpu"] if options.gpu else []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no run of pytest is left behind

    sources = {module: (SOURCE / module).read_bytes() for module in chosen(options.modules)}
    if not sources:
        parser.error(f"no module of src/packlight is {' or '.join(options.modules)}")
    listed = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))["equivalent"]
    everything = [mutant for module in sources for mutant in mutants(module)]
    for entry in listed:
        of_module = [mutant for mutant in everything if mutant.module == entry["module"]]
        if of_module and not any(known([entry], m, sources[m.module]) for m in of_module):
            sys.exit(f"{entry['module']} has no mutant {entry['mutant']}; see {EQUIVALENT.name}")
    drawn = random.Random(options.seed).sample(everything, len(everything))
    drawn = sorted(drawn[: options.count or None], key=lambda m: (m.module, m.start, m.text))

    counts: Counter[tuple[str, str]] = Counter()
    free: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory() as temporary:
        for job in range(options.jobs):
            copy_tree(Path(temporary, str(job)))
            free.put(Path(temporary, str(job)))

        def baseline(module: str) -> float | None:
            """The seconds that a mutant's tests may take, None where they fail without one."""
            folder, start = free.get(), time.perf_counter()
            tests = [*gpu, *tests_of(module)]
            if not tests:
                sys.exit(f"no test imports {module}; name some in TESTS")
            passed = passes(folder, tests)
            free.put(folder)
            taken = time.perf_counter() - start
            note = "" if passed else ", which fail without any mutation"
            print(f"{module}: {' '.join(tests)}, {taken:.0f} s{note}", flush=True)
            return 30 + 3 * taken if passed else None

        touched = sorted({mutant.module for mutant in drawn})
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            limits = dict(zip(touched, pool.map(baseline, touched), strict=True))

        def fate(mutant: Mutant) -> str:
            source = sources[mutant.module]
            if known(listed, mutant, source):
                return "equivalent"
            if mutant.on_device and not options.gpu:
                return "not run"
            if limits[mutant.module] is None:
                return "untested"
            folder = free.get()
            target = folder / "src" / "packlight" / mutant.module
            try:
                target.write_bytes(mutant.apply(source))
                alive = passes(folder, [*gpu, *tests_of(mutant.module)], limits[mutant.module])
            finally:
                target.write_bytes(source)
                free.put(folder)
            if alive:
                print(f"\nsurvived:\n{difference(mutant, source)}", flush=True)
            else:
                print(f"killed: {mutant.module}: {mutant.lines(source)[1]}", flush=True)
            return "survived" if alive else "killed"

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for mutant, found in zip(drawn, pool.map(fate, drawn), strict=True):
                counts[mutant.module, found] += 1

    columns = ("killed", "survived", "equivalent", "not run")
    print(f"\n{'module':40}{'mutants':>9}{''.join(f'{name:>12}' for name in columns)}{'rate':>8}")
    modules = sorted({module for module, _ in counts})
    for name, members in [*((module, [module]) for module in modules), ("all", modules)]:
        row = [sum(counts[module, found] for module in members) for found in columns]
        rate = row[0] / max(1, row[0] + row[1])
        print(f"{name:40}{sum(row):9}{''.join(f'{number:12}' for number in row)}{rate:8.0%}")
    if any(found == "not run" for _, found in counts):
        print("not run: only a GPU runs these; --gpu")
    if any(found == "untested" for _, found in counts):
        sys.exit("some tests fail without any mutation")
    if rate < WANTED:
        sys.exit(f"fewer than {WANTED:.0%} of the mutants were killed")


if __name__ == "__main__":
    main()
