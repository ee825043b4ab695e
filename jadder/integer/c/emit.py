"""The operations of a program as C: their tables, their calls and the kernels that they need."""

import dataclasses
from typing import Any

import numpy as np

from jadder.integer.c import pack, stream, text, thumb
from jadder.integer.c.choose import (
    Choice,
    choose,
    needs_fill,
    pitches,
    scratch_bytes,
    up4,
)
from jadder.integer.c.plan import Layout, Plan, make_plan, zero_bytes
from jadder.integer.c.shifts import with_shifts_of_32
from jadder.integer.c.targets import Target
from jadder.integer.program import (
    Convolution,
    IntegerProgram,
    MaxPool,
    Operation,
    Rescale,
    Reshape,
    SumPool,
)

_READ_BEHIND = 16
"""Bytes that vectors and the widening of rows read behind an activation."""


@dataclasses.dataclass(frozen=True)
class Code:
    """A network in C.

    Attributes:
      plan: where activations lie.
      choices: the code of each operation.
      tables: its constants.
      statements: the body of its function.
      sources: names of the files that it needs, in order.
      assembly: functions in assembly, '' where there are none.
      assembly_size: their bytes.
      table_size: bytes of the constants.
    """

    plan: Plan
    choices: tuple[Choice, ...]
    tables: str
    statements: str
    sources: tuple[str, ...]
    assembly: str
    assembly_size: int
    table_size: int

    @property
    def code_size(self) -> int:
        """About how many bytes of a Cortex-M's memory its instructions take, C and assembly."""
        calls = _THUMB_CALL * len(self.choices)
        return self.assembly_size + calls + sum(_THUMB_SIZES.get(each, 0) for each in self.sources)


_ORDER = (
    "types.h", "finish.c", "border.c", "border_of_channels.c", "copy_image.c", "window.h",
    "adder.c", "multiply.c", "vector.h", "adder_vector.c", "multiply_vector.c", "assembly.h",
    "adder_rows.c", "adder_rows_of_sums.c", "widen.h", "multiply_rows.c",
    "multiply_rows_of_sums.c", "sum_pool.c", "max_pool.c", "rescale.c", "reshape.c",
)  # fmt: skip

_NEEDS = {
    "adder.c": ("window.h", "finish.c"),
    "multiply.c": ("window.h", "finish.c"),
    "adder_vector.c": ("window.h", "finish.c", "vector.h"),
    "multiply_vector.c": ("window.h", "finish.c", "vector.h"),
    "adder_rows.c": ("assembly.h",),
    "multiply_rows.c": ("assembly.h", "widen.h"),
    "adder_rows_of_sums.c": ("assembly.h", "finish.c"),
    "multiply_rows_of_sums.c": ("assembly.h", "widen.h", "finish.c"),
    "sum_pool.c": ("window.h", "finish.c"),
    "max_pool.c": ("window.h",),
    "rescale.c": ("finish.c",),
}


# Bytes of each file's functions, and of a call, as Clang 21 compiles them with -Os for a Cortex-M4.
_THUMB_SIZES = {
    "finish.c": 290, "border.c": 80, "border_of_channels.c": 70, "copy_image.c": 60,
    "adder.c": 280, "multiply.c": 280, "adder_rows.c": 60, "adder_rows_of_sums.c": 75,
    "widen.h": 50, "multiply_rows.c": 75, "multiply_rows_of_sums.c": 90, "sum_pool.c": 140,
    "max_pool.c": 260, "rescale.c": 90, "reshape.c": 150,
}  # fmt: skip
_THUMB_CALL = 60


def emit(program: IntegerProgram, target: Target, name: str) -> Code:
    """The C of a program.

    Raises:
      ValueError: its activations need 2 GiB or more.
    """
    if target.kernels == "thumb":
        program = with_shifts_of_32(program)
    return _Emitter(program, target, name).code()


class _Emitter:
    def __init__(self, program: IntegerProgram, target: Target, name: str) -> None:
        self.program, self.name = program, name
        count = len(program.operations)
        self.choices = [choose(program, index, target) for index in range(count)]
        self.pitches = pitches(program, self.choices)
        scratch = [self._scratch(index) for index in range(count)]
        readers = [
            choice.way
            for operation, choice in zip(program.operations, self.choices, strict=True)
            if operation.input == 0
        ]
        self.plan = make_plan(
            program, self.pitches, scratch, in_place=[self._in_place(i) for i in range(count)],
            copy_image=any(way != "portable" for way in readers),
            slack=0 if target.kernels == "portable" else _READ_BEHIND,
        )  # fmt: skip
        if self.plan.size >= 1 << 31:
            raise ValueError(f"activations of {self.plan.size:,} bytes do not fit a 31-bit arena")
        self.tables: list[str] = []
        self.table_size = 0
        self.statements: list[str] = []
        self.sources = {"types.h"}
        self.kernels: dict[thumb.Kernel, str] = {}
        self.wideners: dict[bool, str] = {}

    def code(self) -> Code:
        self._image()
        for index, operation in enumerate(self.program.operations):
            self.statements.append(f"  /* {index}: {describe(operation)} */")
            self.statements.append("  {")
            if index + 1 < len(self.program.operations):
                self._border(index + 1)
            self._operation(index, operation)
            self.statements.append("  }")
            self.statements.append(f"  {self.name.upper()}_AFTER({index});")
        for used in list(self.sources):
            self.sources.update(_NEEDS.get(used, ()))
        functions = [thumb.widen(f, aligned=aligned) for aligned, f in self.wideners.items()]
        functions += [thumb.function(f, kernel) for kernel, f in self.kernels.items()]
        return Code(
            plan=self.plan,
            choices=tuple(self.choices),
            tables="\n".join([*self._declarations(), *self.tables]),
            statements="\n".join(self.statements),
            sources=tuple(name for name in _ORDER if name in self.sources),
            assembly="\n".join(lines for lines, _ in functions),
            assembly_size=sum(-(-size // 4) * 4 for _, size in functions),
            table_size=self.table_size,
        )

    def _declarations(self) -> list[str]:
        lines = [
            f"void {function}(const uint8_t *from, int16_t *to, int32_t blocks);"
            for function in self.wideners.values()
        ]
        lines += [
            f"void {function}(const void *x, const uint32_t *weights, void *out, "
            "const uint8_t *residual);"
            for function in self.kernels.values()
        ]
        return [line + "\n" for line in lines]

    # -- Memory ------------------------------------------------------------------------------------

    def _scratch(self, index: int) -> int:
        operation, choice = self.program.operations[index], self.choices[index]
        size = scratch_bytes(operation, choice, operation.output)
        if choice.way != "thumb" or not isinstance(operation, Convolution):
            return size
        if operation.product == "multiply":
            size += operation.kernel.shape[0] * 32 * self._blocks(operation)
        return size

    def _blocks(self, operation: Convolution) -> int:
        """Blocks of 16 bytes in the part of a row that a row of results needs."""
        pixels = (operation.output.shape[1] - 1) * operation.strides[1]
        pixels += (operation.kernel.shape[1] - 1) * operation.kernel_dilation[1] + 1
        return -(-pixels * self.pitches[operation.input] // 16)

    def _in_place(self, index: int) -> bool:
        operation, choice = self.program.operations[index], self.choices[index]
        if index + 1 == len(self.program.operations):
            return False
        if needs_fill(self.program, self.choices, self.pitches, index + 1):
            return False
        # Assembly computes one position of odd rows twice.
        width = operation.output.shape[1]
        return not (choice.whole and width > 1 and width % 2)

    def _address(self, value: int, y: int = 0, x: int = 0) -> str:
        """The pixel (y, x) of a value."""
        offset = self.plan.offsets[value]
        at = self.plan.layouts[value].at(y, x)
        if offset is None:
            return f"image + {at}" if at else "image"
        return f"bytes + {offset + at}"

    def _sums(self, index: int) -> str:
        return f"(int32_t *)(void *)(bytes + {self.plan.scratch[index]})"

    def _image(self) -> None:
        if self.plan.offsets[0] is None:
            return
        layout = self.plan.layouts[0]
        height, width, channels = layout.shape
        self.statements.append("  /* The image, with a border or channels between its pixels. */")
        self._border(0)
        self.sources.add("copy_image.c")
        self.statements.append(
            f"  copy_image(image, {height}, {width}, {channels}, {self._address(0)}, "
            f"{layout.row}, {layout.pitch});"
        )

    def _border(self, value: int) -> None:
        """Fills what nobody writes."""
        layout, activation = self.plan.layouts[value], self.program.values[value]
        fill = needs_fill(self.program, self.choices, self.pitches, value)
        if not (layout.bordered or fill):
            return
        base = f"bytes + {self.plan.offsets[value]}"
        zeros = zero_bytes(activation)
        before = layout.at(0, 0)
        between = (layout.left + layout.right) * layout.pitch
        after = layout.right * layout.pitch + layout.bottom * layout.row
        parts = f"{layout.shape[0]}, {layout.row}, {before}, {between}, {after}"
        if fill:  # all of it, as if it were in front of the first row
            parts = f"1, {layout.row}, {layout.size}, {layout.row}, 0"
        if len(set(zeros)) > 1:
            self.sources.add("border_of_channels.c")
            pattern = list(zeros) + [zeros[0]] * (layout.pitch - len(zeros))
            self._table("uint8_t", f"zero_points_{value}", np.array(pattern))
            fields = f"{base}, zero_points_{value}, {layout.pitch}, {parts}"
            self.statements.append(f"  border_of_channels({fields});")
        else:
            self.sources.add("border.c")
            self.statements.append(f"  border({base}, {zeros[0]}, {parts});")

    # -- Tables ------------------------------------------------------------------------------------

    def _table(self, kind: str, name: str, values: Any) -> None:
        size = {"int8_t": 1, "uint8_t": 1, "int16_t": 2, "int64_t": 8}.get(kind, 4)
        self.table_size += size * np.asarray(values).size
        self.tables.append(text.array(kind, name, values))

    def _struct(self, kind: str, name: str, fields: Any) -> None:
        self.table_size += 4 * len(fields)
        self.tables.append(f"static const {kind} {name} = {{{', '.join(map(str, fields))}}};\n")

    def _requantization(self, index: int, operation: Any) -> None:
        each = operation.requantization
        self._table("int32_t", f"multiplier_{index}", each.multiplier)
        self._table("int64_t", f"bias_{index}", each.bias)
        centered = int(isinstance(operation, Convolution) and operation.center)
        fields = [f"multiplier_{index}", f"bias_{index}", operation.output.shape[2],
                  len(each.residuals), each.shift, text.int32(each.low), text.int32(each.high),
                  centered]  # fmt: skip
        self._struct("Requantization", f"requantization_{index}", fields)

    def _results(self, index: int, operation: Any) -> str:
        """Declares where results go and what is added; the last arguments of a call."""
        if index + 1 == len(self.program.operations):
            fields = "0, 0, 0, output"
        else:
            layout = self.plan.layouts[index + 1]
            fields = f"{self._address(index + 1)}, {layout.row}, {layout.pitch}, 0"
        self.statements.append(f"    const Output results = {{{fields}}};")
        if isinstance(operation, MaxPool):
            return "&results"
        self._requantization(index, operation)
        residuals = "0"
        if operation.requantization.residuals:
            residuals = "residuals"
            lines = []
            for one in operation.requantization.residuals:
                layout = self.plan.layouts[one.value]
                factor = text.int64(one.multiplier << one.left_shift)
                at = self._address(one.value)
                lines.append(f"{{{at}, {layout.row}, {layout.pitch}, {factor}}}")
            self.statements.append(
                f"    const Residual residuals[{len(lines)}] = {{{', '.join(lines)}}};"
            )
        return f"&requantization_{index}, {residuals}, &results"

    # -- Operations --------------------------------------------------------------------------------

    def _call(self, function: str, *arguments: Any) -> None:
        self.statements.append(f"    {function}({', '.join(map(str, arguments))});")

    def _operation(self, index: int, operation: Operation) -> None:
        if isinstance(operation, Convolution):
            if self.choices[index].way == "thumb":
                self._assembly(index, operation)
            else:
                self._convolution(index, operation)
        elif isinstance(operation, SumPool):
            self._sum_pool(index, operation)
        elif isinstance(operation, MaxPool):
            self._max_pool(index, operation)
        elif isinstance(operation, Rescale):
            self._rescale(index, operation)
        else:
            self._reshape(index, operation)

    def _corner(self, operation: Any) -> str:
        """Where the first window begins, in the border."""
        (top, _), (left, _) = operation.padding
        return self._address(operation.input, -top, -left)

    def _convolution(self, index: int, operation: Convolution) -> None:
        vector = self.choices[index].way == "vector"
        layout = self.plan.layouts[operation.input]
        source = self.program.values[operation.input]
        height, _, channels, features = operation.kernel.shape
        groups = operation.feature_group_count
        (down, across), (gap, side_gap) = operation.strides, operation.kernel_dilation
        fill = source.zero_point[0] if operation.product == "adder" else 0
        runs = pack.runs(operation.kernel, layout.pitch, 1 if groups == 1 and side_gap == 1 else 0,
                         fill)  # fmt: skip
        taps_across = runs.shape[1] // height
        self._struct("Windows", f"windows_{index}", [
            *operation.output.shape[:2], down * layout.row, across * layout.pitch, height,
            taps_across, gap * layout.row, side_gap * layout.pitch, runs.shape[2], groups,
            features // groups, channels,
        ])  # fmt: skip
        if vector:
            kind = "uint8_t" if operation.product == "adder" else "int16_t"
            self._table(kind, f"weights_{index}", pack.tiled(runs, 16))
        else:
            kind = "uint8_t" if operation.product == "adder" else "int8_t"
            self._table(kind, f"weights_{index}", runs)
        function = operation.product + ("_vector" if vector else "")
        self.sources.add(f"{function}.c")
        rest = self._results(index, operation)
        self._call(function, f"&windows_{index}", self._corner(operation), f"weights_{index}",
                   self._sums(index), rest)  # fmt: skip

    def _assembly(self, index: int, operation: Convolution) -> None:
        choice = self.choices[index]
        layout = self.plan.layouts[operation.input]
        multiplies = operation.product == "multiply"
        down, gap = operation.strides[0], operation.kernel_dilation[0]
        self._table("uint32_t", f"weights_{index}", stream.make(
            operation, self.program.values[operation.input], layout.pitch, choice))  # fmt: skip
        kernel = self._kernel(index, operation)
        row = self.kernels.setdefault(kernel, f"{self.name}_row{len(self.kernels)}")
        out_row, residual_row, residual = 0, 0, "0"
        if choice.whole:
            out_row = self.plan.layouts[index + 1].row
            out = residual = self._address(index + 1)
            residuals = operation.requantization.residuals
            if residuals:
                residual = self._address(residuals[0].value)
                residual_row = self.plan.layouts[residuals[0].value].row
        self._struct("Rows", f"rows_{index}", [operation.output.shape[0], down * layout.row,
                                               out_row, residual_row])  # fmt: skip
        function = f"{operation.product}_rows{'' if choice.whole else '_of_sums'}"
        self.sources.add(f"{function}.c")
        arguments: list[Any] = [row, f"&rows_{index}"]
        if multiplies:
            aligned = layout.pitch % 4 == 0
            widener = self.wideners.setdefault(
                aligned, f"{self.name}_widen{'' if aligned else '_in_order'}"
            )
            blocks = self._blocks(operation)
            self._struct("Wide", f"wide_{index}", [
                widener, operation.kernel.shape[0], gap * layout.row, blocks])  # fmt: skip
            arguments.append(f"&wide_{index}")
        arguments.append(self._corner(operation))
        if multiplies:
            wide = self.plan.scratch[index] + scratch_bytes(operation, choice, operation.output)
            arguments.append(f"(int16_t *)(void *)(bytes + {wide})")
        arguments.append(f"weights_{index}")
        if choice.whole:
            self._call(function, *arguments, out, residual)
            return
        rest = self._results(index, operation)
        self._call(function, *arguments, self._sums(index), operation.output.shape[1], rest)

    def _kernel(self, index: int, operation: Convolution) -> thumb.Kernel:
        layout = self.plan.layouts[operation.input]
        multiplies = operation.product == "multiply"
        runs_across, words = stream.run_words(operation, layout.pitch)
        element = 2 if multiplies else 1
        gap, side_gap = operation.kernel_dilation
        row = 32 * self._blocks(operation) if multiplies else gap * layout.row
        width, features = operation.output.shape[1:]
        step = operation.strides[1] * layout.pitch * element if width > 1 else 0
        taps = ((operation.kernel.shape[0], row),
                (runs_across, side_gap * layout.pitch * element), (words, 4))  # fmt: skip
        return thumb.Kernel(
            operation.product, width, step, tuple(each for each in taps if each[0] > 1),
            up4(features) // 4, up4(features), self.choices[index].epilogue,
        )  # fmt: skip

    def _pool_windows(self, index: int, operation: Any) -> Layout:
        layout = self.plan.layouts[operation.input]
        (down, across), (height, width) = operation.strides, operation.window
        channels = layout.shape[2]
        self._struct("Windows", f"windows_{index}", [
            *operation.output.shape[:2], down * layout.row, across * layout.pitch, height, width,
            layout.row, layout.pitch, channels, 1, channels, 0,
        ])  # fmt: skip
        return layout

    def _sum_pool(self, index: int, operation: SumPool) -> None:
        self._pool_windows(index, operation)
        self.sources.add("sum_pool.c")
        rest = self._results(index, operation)
        self._call("sum_pool", f"&windows_{index}", self._corner(operation), self._sums(index),
                   rest)  # fmt: skip

    def _max_pool(self, index: int, operation: MaxPool) -> None:
        layout = self._pool_windows(index, operation)
        self.sources.add("max_pool.c")
        (top, _), (left, _) = operation.padding
        rest = self._results(index, operation)
        self._call("max_pool", f"&windows_{index}", self._address(operation.input),
                   *layout.shape[:2], *operation.strides, top, left, rest)  # fmt: skip

    def _rescale(self, index: int, operation: Rescale) -> None:
        layout = self.plan.layouts[operation.input]
        self.sources.add("rescale.c")
        rest = self._results(index, operation)
        self._call("rescale", *layout.shape[:2], self._address(operation.input), layout.row,
                   layout.pitch, self._sums(index), rest)  # fmt: skip

    def _reshape(self, index: int, operation: Reshape) -> None:
        self.sources.add("reshape.c")
        for name, value in (("from", operation.input), ("to", index + 1)):
            layout = self.plan.layouts[value]
            self._struct("Layout", f"{name}_{index}", [*layout.shape, layout.row, layout.pitch])
        self._call("reshape", self._address(operation.input), f"&from_{index}",
                   self._address(index + 1), f"&to_{index}")  # fmt: skip


def describe(operation: Operation) -> str:
    """One line about an operation."""
    height, width, channels = operation.output.shape
    result = f"{height} x {width} x {channels}"
    if isinstance(operation, Convolution):
        window = " x ".join(map(str, operation.kernel.shape))
        details = [f"{operation.product} {window}"]
        if operation.strides != (1, 1):
            details.append(f"strides {operation.strides[0]} x {operation.strides[1]}")
        if operation.feature_group_count > 1:
            details.append(f"{operation.feature_group_count} groups")
        if operation.center:
            details.append("centred")
        return f"{', '.join(details)} -> {result}"
    if isinstance(operation, SumPool | MaxPool):
        name = "sum pool" if isinstance(operation, SumPool) else "max pool"
        return f"{name} {operation.window[0]} x {operation.window[1]} -> {result}"
    return f"{'rescale' if isinstance(operation, Rescale) else 'reshape'} -> {result}"
