"""A random search for products that crash, or that are wrong.

    python -m tests.native.search [--cases N] [--seed S] [--sanitize]

Three kinds of cases, N of each: configurations of the public products, their results and gradients
compared with sums in float64; calls with arguments up to 2⁶⁴, through the public products; and
calls of the native handlers themselves with shapes and attributes that need not fit together. A
call either is right or raises an error that says why. With --sanitize the native library is built
for it with the address and undefined-behaviour sanitizers, which end the process at the first
report.

JADDER_CPU_ISA chooses the instruction set.
"""

import argparse
import dataclasses
import functools
import importlib.resources
import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jadder
from jadder.kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
FACTOR = 2**31 - 1
MOST_TERMS = 300_000  # of one case
EXTREMES = (0, 1, 2, 3, 7, 2**15, FACTOR, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)
TOLERANCES = {"float32": 3e-5, "float16": 2e-3, "bfloat16": 2e-2}
ROUNDED = 2e-2  # of products of 16-bit integers
IMPLEMENTATIONS = ("cpu", "cpu_fast", "cpu_int16", None)


def tolerance_of(implementation, dtype):
    least = ROUNDED if implementation == "cpu_int16" else 0
    return max(least, TOLERANCES[dtype])


def psi(clip, d):
    """ψ(d) = clip(scale · d, ±bound), or bound · sign(d)."""
    scale, bound = clip
    return np.sign(d) * bound if math.isinf(scale) else np.clip(scale * d, -bound, bound)


@dataclasses.dataclass(frozen=True)
class Window:
    """A convolution of two spatial dimensions, channels last, for the oracle and the handlers."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    lhs_dilation: tuple[int, int]
    rhs_dilation: tuple[int, int]
    groups: int

    @property
    def out(self):
        """The result's shape."""
        sizes = []
        for d in range(2):
            n, k = self.x[1 + d], self.w[d]
            span = (n - 1) * self.lhs_dilation[d] + 1 if n else 0
            room = span + sum(self.padding[d]) - (k - 1) * self.rhs_dilation[d] - 1
            sizes.append(0 if k == 0 or room < 0 else room // self.strides[d] + 1)
        return (self.x[0], *sizes, self.w[3])

    @property
    def terms(self):
        return math.prod(self.out) * math.prod(self.w[:3])

    @property
    def is_valid(self):
        factors = (*self.strides, *self.lhs_dilation, *self.rhs_dilation)
        return (
            all(1 <= f <= FACTOR for f in factors)
            and all(abs(side) <= FACTOR for pair in self.padding for side in pair)
            and self.groups >= 1
            and self.x[3] % self.groups == 0
            and self.w[3] % self.groups == 0
            and self.x[3] // self.groups == self.w[2]
        )

    @property
    def crops_all(self):
        """Whether padding takes away more than there is, which lax refuses."""
        spans = [
            (n - 1) * d + 1 if n else 0 for n, d in zip(self.x[1:3], self.lhs_dilation, strict=True)
        ]
        return any(n + low + high < 0 for n, (low, high) in zip(spans, self.padding, strict=True))

    @property
    def is_large(self):
        """Whether it has too many terms to sum; XLA itself fails over 10⁹ times nothing."""
        return max(self.terms, math.prod(self.out), *self.out) > MOST_TERMS

    @property
    def attributes(self):
        return {
            "strides": np.array(self.strides, np.int64),
            "padding": np.array(self.padding, np.int64).reshape(-1),
            "lhs_dilation": np.array(self.lhs_dilation, np.int64),
            "rhs_dilation": np.array(self.rhs_dilation, np.int64),
            "groups": np.int64(self.groups),
        }

    def sums(self, x, w, g, clip_x, clip_w, term=np.abs):
        """y, dx and dw in float64."""
        groups, (channels, features) = self.groups, self.w[2:]
        each = features // groups
        y, dx, dw = np.zeros(self.out), np.zeros(self.x), np.zeros(self.w)
        for tap in itertools.product(range(self.w[0]), range(self.w[1])):
            places = [self._sources(d, t) for d, t in enumerate(tap)]
            met = [np.flatnonzero(place >= 0) for place in places]
            at = np.ix_(range(self.x[0]), *(p[m] for p, m in zip(places, met, strict=True)))
            here = np.ix_(range(self.x[0]), *met)
            seen = np.zeros((*self.out[:3], self.x[3]))
            seen[here] = x[at]
            for n in range(groups):
                c, f = slice(n * channels, (n + 1) * channels), slice(n * each, (n + 1) * each)
                difference = seen[..., c, None] - w[tap][:, f]
                of_g = g[..., None, f]
                y[..., f] -= term(difference).sum(-2)
                dw[(*tap, slice(None), f)] += (psi(clip_w, difference) * of_g).sum((0, 1, 2))
                part = np.zeros((*dx.shape[:-1], channels))
                part[at] = (psi(clip_x, -difference) * of_g).sum(-1)[here]
                dx[..., c] += part
        return y, dx, dw

    def _sources(self, d, tap):
        """The source of each output through a tap, -1 where it is a zero."""
        at = np.arange(self.out[1 + d]) * self.strides[d]
        at += tap * self.rhs_dilation[d] - self.padding[d][0]
        dilation = self.lhs_dilation[d]
        inside = (at >= 0) & (at % dilation == 0) & (at // dilation < self.x[1 + d])
        return np.where(inside, at // dilation, -1)


def random_window(rng, *, hostile=False):
    """Mostly small sizes; now and then nothing, a wide dilation, many groups."""

    def size(most, empty=0.03):
        return 0 if rng.random() < empty else int(rng.integers(1, most + 1))

    def pair(draw):
        return tuple(draw() for _ in range(2))

    def factor(most):
        if hostile and rng.random() < 0.3:
            return int(rng.choice(EXTREMES)) * int(rng.choice([1, 1, 1, -1]))
        if rng.random() < 0.15:
            return int(rng.integers(1, 60))
        return int(rng.integers(1, most + 1)) if rng.random() < 0.5 else 1

    def side():
        if hostile and rng.random() < 0.2:
            return int(rng.choice(EXTREMES)) * int(rng.choice([1, -1]))
        return int(rng.integers(-2, 40 if rng.random() < 0.15 else 4))

    groups = int(rng.choice([1, 1, 2, 3, 17]))
    channels, features = size(5), size(int(rng.choice([3, 20, 40])) if groups < 4 else 2)
    flat = rng.random() < 0.3  # one dimension
    spatial = (1, size(60)) if flat else pair(lambda: size(9))
    window = (1, size(5)) if flat else pair(lambda: size(4))
    ones = (1, factor(1)) if flat else None
    case = Window(
        x=(size(3), *spatial, groups * channels),
        w=(*window, channels, groups * features),
        strides=(1, factor(3)) if flat else pair(lambda: factor(3)),
        padding=((0, 0), pair(side)) if flat else pair(lambda: pair(side)),
        lhs_dilation=(1, factor(3)) if flat else pair(lambda: factor(3)),
        rhs_dilation=ones or pair(lambda: factor(3)),
        groups=groups,
    )
    return case, flat


def compare(what, actual, expected, tolerance):
    actual = np.asarray(actual, np.float64).reshape(expected.shape)
    scale = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(
        actual / scale, expected / scale, rtol=0, atol=tolerance, err_msg=what
    )


def random_clips(rng):
    """Of the input and the kernel."""
    bounded = [(1.0, 1.0), (4.0, 1.0), (math.inf, 1.0), (0.5, 2.0)]
    of_x, of_w = (bounded[rng.integers(len(bounded))] for _ in range(2))
    return of_x, (1.0, math.inf) if rng.random() < 0.4 else of_w


def check_configuration(rng, implementations):
    """One product, its results and gradients."""
    if rng.random() < 0.25:
        return check_matmul(rng, implementations)
    case, flat = random_window(rng)
    if case.terms > MOST_TERMS or case.crops_all:
        return "not tried"
    x_shape = (case.x[0], *case.x[2:]) if flat else case.x
    w_shape = case.w[1:] if flat else case.w
    last = slice(1, None) if flat else slice(None)
    options = {
        "strides": case.strides[last],
        "padding": case.padding[last],
        "input_dilation": case.lhs_dilation[last],
        "kernel_dilation": case.rhs_dilation[last],
        "feature_group_count": case.groups,
        "implementation": implementations[rng.integers(len(implementations))],
    }
    if rng.random() < 0.25:
        return check_bytes(rng, case, x_shape, w_shape, options)
    dtype = str(rng.choice(["float32", "float32", "bfloat16", "float16"]))
    clips = random_clips(rng)
    options["rule"] = jadder.GradientRule(*clips)
    draw = functools.partial(operand, rng, dtype)
    x, w, g = draw(case.x), draw(case.w), draw(case.out)

    @jax.jit
    def run(x, w, g):
        y, pullback = jax.vjp(lambda x, w: jadder.adder_conv(x, w, **options), x, w)
        return y, *pullback(g.reshape(y.shape))

    exact = case.sums(x, w, g, *clips)
    results = run(*(jnp.asarray(a, dtype) for a in (x.reshape(x_shape), w.reshape(w_shape), g)))
    tolerance = tolerance_of(options["implementation"], dtype)
    for name, actual, expected in zip(["y", "dx", "dw"], results, exact, strict=True):
        compare(f"{name} of {case} {options} {dtype}", actual, expected, tolerance)
    return "conv"


def operand(rng, dtype, shape):
    """Values of a type, in float64."""
    return np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64)


def check_bytes(rng, case, x_shape, w_shape, options):
    dtype = rng.choice([np.uint8, np.int8])
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    x, w = (rng.integers(low, high + 1, shape).astype(dtype) for shape in (case.x, case.w))
    y = jadder.adder_conv(
        x.reshape(x_shape), w.reshape(w_shape), preferred_element_type=jnp.int32, **options
    )
    wide = (a.astype(np.float64) for a in (x, w))
    compare(f"{case} {options}", y, case.sums(*wide, np.zeros(case.out), (1, 1), (1, 1))[0], 0)
    return "conv of bytes"


def check_matmul(rng, implementations):
    b, m, n = (int(rng.integers(0 if rng.random() < 0.1 else 1, most)) for most in (4, 30, 40))
    k = int(rng.choice([0, 1, 7, 16, 40, 600]))
    if b * m * k * n > MOST_TERMS:
        return "not tried"
    dtype, clips = str(rng.choice(["float32", "bfloat16", "float16"])), random_clips(rng)
    draw = functools.partial(operand, rng, dtype)
    x, w, g = draw((b, m, k)), draw((b, k, n)), draw((b, m, n))
    implementation = implementations[rng.integers(len(implementations))]
    product = functools.partial(
        jadder.adder_einsum,
        "bmk,bkn->bmn",
        rule=jadder.GradientRule(*clips),
        implementation=implementation,
    )
    y, pullback = jax.vjp(product, *(jnp.asarray(a, dtype) for a in (x, w)))
    d = x[..., None] - w[:, None]
    exact = (
        -np.abs(d).sum(2),
        (psi(clips[0], -d) * g[:, :, None]).sum(3),
        (psi(clips[1], d) * g[:, :, None]).sum(1),
    )
    what = f"matmul {(b, m, k, n)} {clips} {dtype} {implementation}"
    tolerance = tolerance_of(implementation, dtype)
    for actual, expected in zip((y, *pullback(jnp.asarray(g, dtype))), exact, strict=True):
        compare(what, actual, expected, tolerance)
    return "matmul"


def check_hostile(rng, implementations):
    """Arguments of the public product that are refused, or right."""
    case, _ = random_window(rng, hostile=True)
    implementation = implementations[rng.integers(len(implementations))]
    product = functools.partial(
        jadder.adder_conv,
        strides=case.strides,
        padding=case.padding,
        input_dilation=case.lhs_dilation,
        kernel_dilation=case.rhs_dilation,
        feature_group_count=case.groups,
        implementation=implementation,
    )
    x, w = (operand(rng, "float32", shape) for shape in (case.x, case.w))
    floats = [jnp.asarray(a, jnp.float32) for a in (x, w)]
    try:
        out = jax.eval_shape(product, *floats).shape
    except (ValueError, TypeError) as refusal:
        error = str(refusal)
    else:
        error = None
    if error is not None:
        assert "adder_conv" in error, error
        return "refused"
    assert case.is_valid, case
    assert out == case.out, (case, out)
    if case.is_large:
        return "not tried"
    g = operand(rng, "float32", out)
    y, pullback = jax.vjp(product, *floats)
    exact = case.sums(x, w, g, (1.0, 1.0), (1.0, math.inf))
    tolerance = tolerance_of(implementation, "float32")
    for actual, expected in zip((y, *pullback(jnp.asarray(g, "float32"))), exact, strict=True):
        compare(f"hostile {case} {implementation}", actual, expected, tolerance)
    return "right"


def check_handler(rng, _):
    """A handler, called with what may not fit."""
    case, _ = random_window(rng, hostile=rng.random() < 0.5)
    which = int(rng.integers(3))
    name = ("conv", "conv_dx", "conv_dw")[which]
    rounds = rng.random() < 0.4
    squares = which == 0 and rng.random() < 0.4
    if case.is_valid and case.is_large:
        return "not tried"
    given_out = case.out if case.is_valid else (case.x[0], 2, 2, case.w[3])
    shapes = [case.x, case.w, given_out]
    result = [given_out, case.x, case.w][which]
    changed = rng.random() < 0.5

    def change(shape):
        shape = list(shape)
        shape[rng.integers(4)] += int(rng.choice([-1, 1, 5]))
        return tuple(max(0, n) for n in shape)

    if changed:
        victim = int(rng.integers(4))
        if victim == 3:
            before, result = result, change(result)
        else:
            before = shapes[victim]
            shapes[victim] = change(before)
            if which == 0 and victim == 2:
                return "no change"
        changed = before != (result if victim == 3 else shapes[victim])
    dtype = str(rng.choice(["float32", "bfloat16"]))
    if math.prod(result) == 0:  # XLA calls nobody for it
        return "not tried"
    x, w, g = (operand(rng, dtype, shape) for shape in shapes)
    operands = [jnp.asarray(a, dtype) for a in ((x, w) if which == 0 else (x, w, g))]
    attributes = dict(case.attributes)
    if which == 0 and not rounds and not squares:
        attributes["fast"] = np.bool_(False)
    if which:
        attributes |= {"scale": np.float64(1), "bound": np.float64(1)}
    target = f"jadder_{'int16_' * rounds}{'euclid_' * squares}{name}"
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(result, jnp.float32))
    try:
        actual = np.asarray(call(*operands, **attributes))
    except jax.errors.JaxRuntimeError as refusal:
        error = str(refusal)
    else:
        error = None
    if error is not None:
        assert "INVALID_ARGUMENT: jadder" in error, error
        assert changed or not case.is_valid, (case, error)
        return "refused"
    final = dataclasses.replace(case, x=shapes[0], w=shapes[1])
    assert final.is_valid, (case, shapes)
    assert which == 0 or shapes[2] == final.out, (case, shapes)
    assert result == (final.out, final.x, final.w)[which], (case, shapes, result)
    g = g if which else np.zeros(final.out)
    term = np.square if squares else np.abs
    expected = final.sums(x, w, g, (1.0, 1.0), (1.0, 1.0), term)[which]
    tolerance = ROUNDED if rounds else TOLERANCES["float32"]
    compare(f"{target} of {final}", actual, expected, tolerance)
    return "right"


CHECKS = (check_configuration, check_hostile, check_handler)


def search(cases, seed, implementations=IMPLEMENTATIONS):
    """Counts of what ``cases`` of each kind came to."""
    counts = Counter()
    for check in CHECKS:
        for i in range(cases):
            rng = np.random.default_rng([seed, i, CHECKS.index(check)])
            counts[f"{check.__name__.removeprefix('check_')}: {check(rng, implementations)}"] += 1
            if i % 100 == 99:
                jax.clear_caches()  # each case has programs of its own
    return counts


def build_sanitized(directory, compiler):
    """The native library under the address and undefined-behaviour sanitizers."""
    sources = ROOT / "csrc"
    include = Path(jax.lib.__file__).parents[2] / "jaxlib" / "include"
    command = [compiler, "-std=c++17", "-O1", "-g1", "-fPIC", f"-I{sources}", "-isystem", include]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    avx2 = ["-mavx2", "-mfma"]
    avx512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *avx2]
    sets = {"baseline": [], **({"avx2": avx2, "avx512": avx512} if is_x86 else {})}
    more = {"avx512vnni": [*avx512, "-mavx512vnni"]} if is_x86 else {}
    command += ["-DJADDER_X86"] if is_x86 else []
    version = f'-DJADDER_JAXLIB_VERSION="{cpu.jaxlib.version.__version__}"'
    objects = []
    for source in sorted(sources.glob("*.cc")):
        kernels = {**sets, **(more if source.stem in ("kernels", "program_kernels") else {})}
        for name, flags in kernels.items() if "kernels" in source.stem else [("", [])]:
            objects.append(Path(directory) / f"{source.stem}{name}.o")
            subprocess.run([*command, version, *flags, "-c", source, "-o", objects[-1]], check=True)
    library = Path(directory) / "_native" / cpu._LIBRARY
    library.parent.mkdir()
    subprocess.run([*command, "-shared", *objects, "-o", library], check=True)


def run_sanitized(arguments):
    """This program again, with the sanitizers' library loaded before all others."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise SystemExit("--sanitize needs g++")
    # Before all others, and with them what throws: Python has no C++ of its own.
    preloaded = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    with tempfile.TemporaryDirectory() as directory:
        build_sanitized(directory, compiler)
        environment = os.environ | {
            "LD_PRELOAD": " ".join(preloaded),
            # Python keeps much until it ends; absurd sizes are for the library to refuse.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        command = [sys.executable, "-m", "tests.native.search", "--library", directory]
        raise SystemExit(
            subprocess.run([*command, *arguments], env=environment, cwd=ROOT).returncode
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--library", help="a folder with a native library to use")
    options = parser.parse_args()
    if options.sanitize:
        run_sanitized(["--cases", str(options.cases), "--seed", str(options.seed)])
    if options.library:
        importlib.resources.files = lambda package: Path(options.library)
    counts = search(options.cases, options.seed)
    print(cpu.instruction_set(), *(f"{n} {what}" for what, n in sorted(counts.items())), sep="\n  ")


if __name__ == "__main__":
    main()
