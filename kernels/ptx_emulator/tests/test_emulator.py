"""The emulator against numpy, and against programs that are wrong on purpose.

Needs a process whose Triton compiles: see test_in_own_process.py.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator.code import Code
from ptx_emulator.driver import use
from ptx_emulator.emulator import Mode, launch
from ptx_emulator.errors import PtxError
from ptx_emulator.memory.global_races import GlobalWatch
from ptx_emulator.memory.tensor_map import TensorMap
from ptx_emulator.parser import parse
from triton.tools.tensor_descriptor import TensorDescriptor

MODES = [
    Mode(),
    Mode(asynchronous="lazy"),
    Mode(asynchronous="lazy", seed=1),
    Mode(asynchronous="random", seed=2),
]
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Matrix products


@triton.jit
def dot_kernel(
    p_a, p_b, p_out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, A_T: tl.constexpr, B_T: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(p_a + k[:, None] * M + m[None, :]).T if A_T else tl.load(p_a + m[:, None] * K + k[None, :])
    b_b = tl.load(p_b + n[:, None] * K + k[None, :]).T if B_T else tl.load(p_b + k[:, None] * N + n[None, :])
    b_out = tl.zeros((M, N), tl.float32)
    if ADD:
        b_out += 2.0
    b_out = tl.dot(b_a, b_b, b_out)
    tl.store(p_out + m[:, None] * N + n[None, :], b_out)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 64), (128, 32, 16), (128, 256, 32), (16, 64, 32)], ids=str)
@pytest.mark.parametrize(("dtype", "num_warps"), [("bf16", 4), ("fp16", 8), ("fp32", 4)])
def test_dot(dtype, num_warps, shape, transposed):
    """wgmma (mma.sync for 16 rows) with every operand layout; float32 as tf32."""
    M, N, K = shape
    a, b = random(M, K, dtype=TORCH[dtype]), random(K, N, dtype=TORCH[dtype], seed=1)
    in_memory = [x.T.contiguous() if flip else x for x, flip in zip((a, b), transposed, strict=True)]
    exact = a.double() @ b.double() + 2
    tolerance = 0.05 if dtype == "fp32" else 1e-4
    for mode in MODES[:3:2]:
        out = torch.full((M, N), float("nan"))
        with use(mode):
            dot_kernel[(1,)](*in_memory, out, M, N, K, *transposed, True, num_warps=num_warps)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


@triton.jit
def loop_kernel(t_a, t_b, t_out, K, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr):
    b_out = tl.zeros((M, N), tl.float32)
    row = tl.program_id(0) * M
    for k in tl.range(0, K, STEP):
        b_out = tl.dot(t_a.load([row, k]), t_b.load([k, 0]), b_out)
    t_out.store([row, 0], b_out.to(t_out.dtype))


@pytest.mark.parametrize("columns", [32, 64])
def test_pipelined_products_through_tma(columns):
    """Loads and stores by descriptors with swizzles of 64 and 128 bytes, edges included, in a pipelined loop."""
    M, N, K = 100, columns - 8, 200
    a, b = random(M, K, dtype=torch.bfloat16), random(K, N, dtype=torch.bfloat16, seed=1)
    exact = a.double() @ b.double()
    results = []
    for mode in MODES:
        out = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
        with use(mode):
            loop_kernel[(2,)](
                TensorDescriptor.from_tensor(a, [64, 32]),
                TensorDescriptor.from_tensor(b, [32, columns]),
                TensorDescriptor.from_tensor(out, [64, columns]),
                K, M=64, N=columns, STEP=32, num_stages=3,
            )  # fmt: skip
        torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=0.01)
        results.append(out)
    assert all(torch.equal(x, results[0]) for x in results)


# TMA alone


@triton.jit
def copy_kernel(t_in, t_out, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    at = [tl.program_id(0) * A, tl.program_id(1) * B, tl.program_id(2) * C]
    t_out.store(at, t_in.load(at))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("columns", [16, 64])
def test_tma_round_trip(dtype, columns):
    """Three dimensions, ends that do not fill a box, wide boxes split in pieces."""
    x = random(5, 9, 3 * columns + 8, dtype=TORCH[dtype])
    for mode in MODES:
        out = torch.full_like(x, float("nan"))
        block = [2, 4, columns]
        with use(mode):
            copy_kernel[(3, 3, 4)](
                TensorDescriptor.from_tensor(x, block), TensorDescriptor.from_tensor(out, block), *block
            )
        assert torch.equal(out, x)


@triton.jit
def add_kernel(p_x, t_sum, M: tl.constexpr, N: tl.constexpr):
    b_x = tl.load(p_x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    t_sum.atomic_add([0, 0], b_x * (tl.program_id(0) + 1))


def test_tma_reduction():
    x, total = random(32, 32), torch.ones(30, 32)
    with use(MODES[2]):
        add_kernel[(3,)](x, TensorDescriptor.from_tensor(total, [32, 32]), 32, 32)
    torch.testing.assert_close(total, 1 + 6 * x[:30])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"address": 4096 + 8}, "not a multiple of 16"),
        ({"strides": [20, 1]}, "byte strides"),
        ({"box": [512, 64]}, "box"),
        ({"box": [8, 128]}, "wider than the swizzle's 128"),
        ({"box": [8, 4], "swizzle": 0}, "inner box of 8 bytes"),
    ],
    ids=str,
)
def test_what_the_driver_refuses_of_tensor_maps(change, problem):
    good = {"address": 4096, "swizzle": 3, "element": 2, "type_": 10, "box": [8, 64], "shape": [100, 64],
            "strides": [64, 1], "padding": 0}  # fmt: skip
    assert TensorMap.encode(**good).bytes == 1024
    with pytest.raises(PtxError, match=problem):
        TensorMap.encode(**good | change)


# Lanes, integers, atomic operations


@triton.jit
def lanes_kernel(p_x, p_sum, p_best, p_running, p_sorted, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    here = m[:, None] * N + n[None, :]
    b_x = tl.load(p_x + here)
    tl.store(p_sum + n, tl.sum(b_x, 0))
    tl.store(p_best + m, tl.argmax(b_x, 1))
    tl.store(p_running + here, tl.cumsum(b_x, 1))
    tl.store(p_sorted + here, tl.sort(b_x, 1))


@pytest.mark.parametrize("shape", [(4, 128), (64, 8), (1, 512)], ids=str)
def test_reductions_scans_and_sorts(shape):
    x = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(3)).float()
    outs = (
        torch.empty(shape[1]),
        torch.empty(shape[0], dtype=torch.int32),
        torch.empty(shape),
        torch.empty(shape),
    )
    with use(MODES[2]):
        lanes_kernel[(1,)](x, *outs, *shape)
    assert torch.equal(outs[0], x.sum(0))
    assert torch.equal(outs[1].long(), torch.from_numpy(np.argmax(x.numpy(), 1)))
    assert torch.equal(outs[2], x.cumsum(1))
    assert torch.equal(outs[3], x.sort(1).values)


@triton.jit
def integers_kernel(p_a, p_b, p_out, N: tl.constexpr):
    n = tl.arange(0, N)
    a, b = tl.load(p_a + n), tl.load(p_b + n)
    tl.store(p_out + n, a // b)
    tl.store(p_out + N + n, a % b)
    tl.store(p_out + 2 * N + n, (a >> 3) ^ (b << 5) | (a & ~b))
    tl.store(p_out + 3 * N + n, tl.minimum(a * b, tl.maximum(a, -b)))
    tl.store(p_out + 4 * N + n, (a.to(tl.float32) * 0.37).to(tl.int32))
    tl.store(
        p_out + 5 * N + n,
        tl.umulhi(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)).to(tl.int32),
    )


def test_integers():
    generator = np.random.default_rng(5)
    a = generator.integers(-(2**31), 2**31, 256, dtype=np.int64).astype(np.int32)
    b = generator.integers(1, 2**20, 256, dtype=np.int64).astype(np.int32) * generator.choice(
        [-1, 1], 256
    ).astype(np.int32)
    out = torch.empty(6, 256, dtype=torch.int32)
    with use():
        integers_kernel[(1,)](torch.from_numpy(a), torch.from_numpy(b), out, 256)
    quotient = np.trunc(a.astype(np.float64) / b).astype(np.int32)
    with np.errstate(over="ignore"):
        expected = [
            quotient,
            a - quotient * b,
            (a >> 3) ^ (b << 5) | (a & ~b),
            np.minimum(a * b, np.maximum(a, -b)),
            (a.astype(np.float32) * np.float32(0.37)).astype(np.int32),
            (a.view(np.uint32).astype(np.uint64) * b.view(np.uint32) >> np.uint64(32))
            .astype(np.uint32)
            .view(np.int32),
        ]
    for ours, exact in zip(out.numpy(), expected, strict=True):
        assert (ours == exact).all()


@triton.jit
def atomic_kernel(p_count, p_sum, p_old, N: tl.constexpr):
    n = tl.arange(0, N)
    old = tl.atomic_add(p_count + n % 3, n)
    tl.atomic_add(p_sum, 0.5 * tl.sum((old >= 0).to(tl.float32), 0))
    tl.atomic_max(p_old, tl.max(old, 0))


def test_atomic_operations():
    count, total, largest = (
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int32),
    )
    with use(MODES[3]):
        atomic_kernel[(4,)](count, total, largest, 64)
    assert count.tolist() == [4 * sum(range(first, 64, 3)) for first in range(3)]
    assert total.item() == 4 * 64 * 0.5
    assert 0 < largest.item() < max(count.tolist())


# Faults of kernels


@triton.jit
def shift_kernel(p_x, p_out, n, SHIFT: tl.constexpr, N: tl.constexpr):
    here = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_out + here, tl.load(p_x + here + SHIFT, mask=here < n), mask=here < n + SHIFT)


def test_accesses_outside_the_tensors_are_caught():
    x, out = torch.ones(300), torch.ones(300)
    with use():
        shift_kernel[(3,)](x, out, 300, 0, 128)
        with pytest.raises(PtxError, match=r"global load of 4 bytes at .* outside every argument; near"):
            shift_kernel[(3,)](x, out, 300, 1, 128)
        with pytest.raises(PtxError, match="global store"):
            shift_kernel[(3,)](torch.ones(301), out, 300, 1, 128)


def test_blocks_that_overlap_are_caught():
    x, out = torch.ones(500), torch.ones(500)
    with use(), pytest.raises(PtxError, match="race between blocks on p_out"):
        shift_kernel[(2,)](torch.rand(500), x, 300, 0, 128)
        overlap_kernel[(2,)](x, out, 128)


@triton.jit
def overlap_kernel(p_x, p_out, N: tl.constexpr):
    here = tl.program_id(0) * (N // 2) + tl.arange(0, N)
    tl.store(p_out + here, tl.load(p_x + here) + tl.program_id(0))


@pytest.mark.parametrize(
    ("accesses", "races"),
    [
        ("A reads, B reads, A reads", False),
        ("A writes, A reads, A updates, A writes, A updates", False),
        ("A updates, B updates, A updates", False),
        ("A reads, B writes", True),
        ("B reads, A reads, A writes", True),
        ("A reads, B reads, A writes", True),
        ("B reads, A updates", True),
        ("A reads, A updates, B updates", True),
        ("A updates, B reads", True),
        ("A updates, A reads, B reads", True),
        ("A writes, B updates", True),
        ("A writes, A updates, B updates", True),
        ("A updates, A writes, B updates", True),
        ("A updates, B updates, A writes", True),
    ],
    ids=str,
)
def test_races_between_blocks(accesses, races):
    watch = GlobalWatch(1000, 1100)
    address = np.array([1000])
    steps = [x.split() for x in accesses.split(", ")]

    def act(block, access):
        if access == "reads":
            watch.read(address, 4, block, "p_x")
        elif access == "updates":
            watch.update(address, 4, block, "p_x")
        else:
            watch.write(address, 4, block, "p_x", lambda: False)

    for who, access in steps[:-1]:
        act("AB".index(who) + 1, access)
    who, access = steps[-1]
    if races:
        with pytest.raises(PtxError, match="race between blocks on p_x at 0x3e8"):
            act("AB".index(who) + 1, access)
    else:
        act("AB".index(who) + 1, access)


HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 p_out) .reqntid 256
{
    .reg .pred %p<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [p_out];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd1, %rd1, %rd2;
    mov.b32 %r2, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
"""


def run_ptx(body, mode=None):
    """Run a program of 256 threads with 2 KiB of shared memory; returns what it wrote to its 256 words."""
    out = torch.full((256,), -1, dtype=torch.int32)
    code = Code(parse(HEAD + body + "\n    ret;\n}\n"))
    launch(code, (1, 1, 1), 2048, [out.data_ptr()], [("p_out", out)], mode or Mode())
    return out


def test_integer_minimum_and_maximum_clamped_at_zero():
    for name, expected in (("min", [0] * 128 + [3] * 128), ("max", [3] * 256)):
        body = f"sub.s32 %r5, %r1, 128; shl.b32 %r5, %r5, 4; {name}.relu.s32 %r6, %r5, 3; st.global.b32 [%rd1], %r6;"
        out = run_ptx(body).tolist()
        assert out[:128] == expected[:128]
        assert out[130:] == (expected[130:] if name == "min" else [16 * x for x in range(2, 128)])


# Every thread gives its number to the thread 128 away.
EXCHANGE = """
    st.shared.b32 [%r4], %r1;
    {}
    xor.b32 %r5, %r3, 512;
    add.s32 %r5, %r2, %r5;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd1], %r6;
"""


def test_an_exchange_needs_its_barrier():
    for mode in MODES:
        assert run_ptx(EXCHANGE.format("bar.sync 0;"), mode).tolist() == [x ^ 128 for x in range(256)]
        with pytest.raises(PtxError, match="race on shared memory"):
            run_ptx(EXCHANGE.format(""), mode)
    blind = Mode(asynchronous="lazy", seed=1, races=False)
    assert run_ptx(EXCHANGE.format(""), blind).tolist() != [x ^ 128 for x in range(256)]


def test_half_a_barrier_is_a_deadlock_with_names():
    body = "setp.lt.u32 %p1, %r1, 128;\n@%p1 bra $L1;\nbar.sync 1, 256;\n$L1:\n"
    with pytest.raises(PtxError, match=r"deadlock(.|\n)*warp 0: ended(.|\n)*warp 7: 'bar.sync 1, 256'"):
        run_ptx(body)


def test_an_mbarrier_orders_a_producer_and_a_consumer():
    body = """
    setp.eq.b32 %p1, %r1, 0;
    add.s32 %r10, %r2, 1024;
    @%p1 mbarrier.init.shared::cta.b64 [%r10], 128;
    bar.sync 0;
    setp.lt.u32 %p2, %r1, 128;
    @%p2 bra $L_produce;
    {
    .reg .pred done;
    again: mbarrier.try_wait.parity.shared.b64 done, [%r10], 0;
    @!done bra.uni again;
    }
    ld.shared.b32 %r6, [%r4+-512];
    st.global.b32 [%rd1], %r6;
    ret;
    $L_produce:
    mul.lo.s32 %r7, %r1, 3;
    st.shared.b32 [%r4], %r7;
    """
    arrive = "mbarrier.arrive.shared.b64 _, [%r10];"
    for mode in MODES:
        assert run_ptx(body + arrive, mode)[128:].tolist() == [3 * x for x in range(128)]
    with pytest.raises(PtxError, match=r"deadlock(.|\n)*128 of 128 arrivals"):
        run_ptx(body)
    with pytest.raises(PtxError, match="race on shared memory"):
        run_ptx(
            body.replace("mbarrier.try_wait.parity.shared.b64 done, [%r10], 0", "setp.eq.b32 done, 0, 0")
            + arrive
        )
    with pytest.raises(PtxError, match="more arrivals"):
        run_ptx(body + arrive.replace(";", ", 200;"))


# Four warps multiply 64 rows of A, in registers, by 8 columns of zeros in shared memory.
PRODUCT = """
    setp.ge.u32 %p1, %r1, 128;
    @%p1 ret;
    mov.b32 %r5, 0;
    st.shared.b32 [%r4], %r5;
    fence.proxy.async.shared::cta;
    bar.sync 1, 128;
    mov.b32 %r10, %r1;
    mov.b32 %r11, %r1;
    mov.b32 %r12, %r1;
    mov.b32 %r13, %r1;
    setp.eq.b32 %p2, 0, 1;
    mov.b64 %rd3, 0x0000000800000040;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, %rd3, %p2, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {}
    wgmma.wait_group.sync.aligned 0;
    {}
    st.global.b32 [%rd1], %r20;
"""


@pytest.mark.parametrize("mode", MODES)
def test_registers_of_a_product_are_left_alone_until_its_wait(mode):
    for harmless in ("", "@%p2 mov.b32 %r12, %r5;"):
        out = run_ptx(PRODUCT.format(harmless, "mov.b32 %r12, %r5;"), mode)
        assert out.tolist() == [0] * 128 + [-1] * 128
    problem = "%r{} is written before the wgmma.wait_group that completes 'wgmma.mma_async.*'"
    for register in (10, 13, 20, 23):
        writes = (f"mov.b32 %r{register}, %r3;", f"setp.eq.b32 %p3, %r1, 5; @%p3 mov.b32 %r{register}, 7;")
        for write in writes[: 2 if register < 20 else 1]:
            with pytest.raises(PtxError, match=problem.format(register)):
                run_ptx(PRODUCT.format(write, ""), mode)


def test_lanes_part_and_meet_again():
    body = """
    and.b32 %r5, %r1, 7;
    mov.b32 %r6, 0;
    $L_loop:
    setp.ge.u32 %p1, %r6, %r5;
    @%p1 bra $L_out;
    add.s32 %r6, %r6, 1;
    bra $L_loop;
    $L_out:
    shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
    st.global.b32 [%rd1], %r7;
    """
    assert run_ptx(body).tolist() == [(x ^ 1) & 7 for x in range(256)]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("fancy.op.b32 %r5, %r6;", "unknown instruction 'fancy.op.b32 %r5, %r6'"),
        ("add.s32 %r4, %r4, 2; ld.shared.b32 %r5, [%r4];", "shared load of 4 bytes .* is misaligned"),
        ("ld.shared.b32 %r5, [%r4+1100];", "shared load of 4 bytes at offset 1996 to 2120 of 2048"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;", "must be executed by all 32 lanes"),
        ("mbarrier.arrive.shared.b64 _, [%r2];", "no live mbarrier at offset 0"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", "names lanes"),
    ],
    ids=str,
)
def test_faults_are_named(body, problem):
    with pytest.raises(PtxError, match=problem):
        run_ptx(body)


@pytest.mark.parametrize(
    ("removed", "problem"),
    [
        ("wgmma.wait_group", "reads an accumulator"),
        ("wgmma.fence", "no wgmma.fence"),
        ("fence.proxy.async", "no fence.proxy.async"),
        ("bar.sync", "race on shared memory"),
    ],
)
def test_a_real_program_without_its_synchronisation_is_caught(removed, problem, monkeypatch):
    from ptx_emulator import driver

    a, b, out = (
        random(64, 64, dtype=torch.bfloat16),
        random(64, 64, dtype=torch.bfloat16),
        torch.empty(64, 64),
    )
    monkeypatch.setattr(
        driver, "_code", lambda ptx: Code(parse("\n".join(x for x in ptx.split("\n") if removed not in x)))
    )
    with use(), pytest.raises(PtxError, match=problem):
        dot_kernel[(1,)](a, b, out, 64, 64, 64, False, False, True)
