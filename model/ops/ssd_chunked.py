"""The chunked form of SSD in plain torch, with a backward of its own that recomputes instead of saving.

Per chunk of Q tokens, with cs the running sum of the log-decays dt A (restarted at each chunk and each document):

    within the chunk    Y_i  = sum_j M_ij (dt x)_j    M_ij = exp(cs_i - cs_j) (C_i . B_j)  for j <= i in one document
    from before it      Y_i += exp(cs_i) C_i S_in     if token i continues the document that S_in belongs to
    state it leaves     S_out = exp(cs_end) S_in + sum_j exp(cs_end - cs_j) B_j (dt x)_j

C B^T, C S_in and the states are one matmul per group, not per head. The loop over chunks keeps every intermediate small
enough for the cache, which is where the speed on a CPU comes from. Saved for backward: the inputs and the chunk
states in the compute dtype.

Isolation between documents is exact: what crosses a boundary is multiplied by exact zeros, and cs never adds numbers
of two documents (a difference of whole-row cumulative sums would leak their rounding).

Legend: b batch, T tokens, G groups, R heads per group, P head dim, N state, Q tokens of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.blockwise import LOG2_E, Scratch, exp2_, least_exponent, wide_dtype


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    documents: Tensor | None,
    initial_state: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `model.ops.ssd.ssd`. chunk: None takes what was measured to be fast."""
    wide = wide_dtype(x.dtype)
    b, T, H, P = x.shape
    if initial_state is None:
        initial_state = x.new_zeros(b, H, P, B.shape[-1], dtype=wide)
    chunk = chunk or 128
    y, state = _ChunkedSSD.apply(
        x,
        dt.to(wide),
        A.to(wide),
        B.to(x.dtype),
        C.to(x.dtype),
        None if D is None else D.to(wide),
        documents,
        initial_state.to(wide),
        min(chunk, T),
    )
    return y, state


def segment_sum(a: Tensor, key: Tensor, span: int, reverse: bool = False) -> Tensor:
    """Running sum of a (b, T, H) inside each run of equal key (b, T), runs being at most `span` long.

    By doubling (log2(span) shifted additions): each sum is a balanced tree of the run's own elements, so that it is
    more accurate than a left-to-right sum and does not change by a bit when another run does.
    """
    T, distance = a.shape[1], 1
    while distance < min(span, T):
        same = (key[:, distance:] == key[:, :-distance])[..., None]
        if reverse:
            more = torch.where(same, a[:, distance:], 0)
            a = torch.cat([a[:, :-distance] + more, a[:, -distance:]], 1)
        else:
            more = torch.where(same, a[:, :-distance], 0)
            a = torch.cat([a[:, :distance], a[:, distance:] + more], 1)
        distance *= 2
    return a


@dataclass(frozen=True)
class Decay:
    """All decays of a row: they are small (one number per token and head), so they are computed at once.

    cs: (b, G, R, T), log2 of the decay from the start of the token's run (its part of a document inside a chunk)
    through the token. enter: (b, T, G, R), factor of the state that enters the chunk. leave: (b, T, G, R), decay from
    the token to the chunk's end, 0 if another document ends there. through: (b, chunks, G, R), from the chunk's start
    to its end. key: (b, T), numbers the runs. index: (b, T), of documents, of which there are several unless `single`.
    future: (chunk, chunk) bool, above the diagonal.
    """

    cs: Tensor
    enter: Tensor
    leave: Tensor
    through: Tensor
    key: Tensor
    index: Tensor
    single: bool
    future: Tensor

    @staticmethod
    def of(log_decay: Tensor, groups: int, documents: Tensor | None, chunk: int) -> "Decay":
        """log_decay: (b, T, H)."""
        b, T, H = log_decay.shape
        steps = torch.arange(T, device=log_decay.device)
        chunk_of = steps // chunk
        end_of = torch.clamp((chunk_of + 1) * chunk - 1, max=T - 1)
        index = torch.zeros_like(steps[None]).expand(b, T) if documents is None else documents.long()
        key = chunk_of * (T + 1) + index
        # What decays to nothing in one token may as well decay a little less: sums stay small, and so does their
        # rounding, which the difference of two of them keeps.
        cs = segment_sum(log_decay.clamp(min=least_exponent(log_decay.dtype)) * LOG2_E, key, chunk)
        # A chunk continues the document of the last token before it; the first chunk continues index 0.
        before = torch.cat([torch.zeros_like(index[:, :1]), index[:, end_of[:-chunk:chunk]]], 1)  # (b, chunks)
        continues = (index == before[:, chunk_of])[..., None]
        at_end = (index == index[:, end_of])[..., None]
        enter = torch.where(continues, exp2_(cs.clone()), 0)
        leave = torch.where(at_end, exp2_(cs[:, end_of] - cs), 0)
        through = enter[:, end_of[::chunk]]
        shape = (groups, H // groups)
        return Decay(
            cs.transpose(1, 2).contiguous().view(b, *shape, T),
            enter.unflatten(2, shape),
            leave.unflatten(2, shape),
            through.unflatten(2, shape),
            key,
            index,
            documents is None,
            torch.ones(chunk, chunk, dtype=torch.bool, device=cs.device).triu(1),
        )

    def within(self, span: slice, room: Scratch) -> Tensor:
        """(b, G, R, Q, Q): decay from token j to token i of the chunk; meaningless, but finite, where i sees no j."""
        cs = self.cs[..., span]
        out = room("within", (*cs.shape, cs.shape[-1]), cs.dtype)
        return exp2_(torch.sub(cs[..., :, None], cs[..., None, :], out=out))

    def hidden(self, span: slice) -> Tensor:
        """(b, 1, Q, Q) or (Q, Q) bool: token i of the chunk does not see token j."""
        index = self.index[:, span]
        future = self.future[: index.shape[1], : index.shape[1]]
        return future if self.single else future | (index[:, :, None] != index[:, None])[:, None]


def spans_of(T: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, T)) for start in range(0, T, chunk)]


def dot(room: Scratch, name: str, v: Tensor, w: Tensor) -> Tensor:
    """Matmul over the last two dimensions; those before them are equal. The result lies in `room`."""
    out = room(name, (*v.shape[:-1], w.shape[-1]), v.dtype)
    many = out.view(-1, *out.shape[-2:])
    v, w = v.reshape(-1, *v.shape[-2:]), w.reshape(-1, *w.shape[-2:])
    if len(many) == 1:
        torch.mm(v[0], w[0], out=many[0])  # up to 3 times as fast as a batch of one, on transposed arguments
    else:
        torch.bmm(v, w, out=many)
    return out


class _Chunk:
    """The inputs of one chunk in the layouts that the matmuls want. Suffix h: heads first (b, G, R, Q, P), g: groups
    first (b, G, Q, N) or (b, G, Q, R P); without: tokens first (b, Q, G, R, P), in the wide dtype."""

    def __init__(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, decay: Decay, number: int, span: slice, room: Scratch
    ):
        xc, wide = x[:, span], dt.dtype
        self.b, self.Q, self.G, self.R, self.P = xc.shape
        self.narrow, self.room = x.dtype, room
        self.x = room("x", xc.shape, wide).copy_(xc)
        self.dt = dt[:, span, ..., None]
        self.dtx = torch.mul(self.x, self.dt, out=room("dtx", xc.shape, wide))
        self.dtxh = self.heads_first("dtxh", self.dtx)
        self.Bg, self.Cg = B[:, span].transpose(1, 2), C[:, span].transpose(1, 2)
        self.enter, self.leave = decay.enter[:, span, ..., None], decay.leave[:, span, ..., None]
        self.through = decay.through[:, number, :, None, :, None]  # against (b, G, N, R, P)
        self.L, self.hidden = decay.within(span, room), decay.hidden(span)
        CB = self.dot("CB", self.Cg, self.Bg.transpose(2, 3)).masked_fill_(self.hidden, 0)
        self.CB = CB.to(wide)[:, :, None]

    def heads_first(self, name: str, v: Tensor) -> Tensor:
        """(b, Q, G, R, P) -> (b, G, R, Q, P) in the narrow dtype."""
        shape = (self.b, self.G, self.R, self.Q, self.P)
        return self.room(name, shape, self.narrow).copy_(v.permute(0, 2, 3, 1, 4))

    def groups_first(self, name: str, v: Tensor) -> Tensor:
        """(b, Q, G, R, P) -> (b, G, Q, R P) in the narrow dtype."""
        out = self.room(name, (self.b, self.G, self.Q, self.R, self.P), self.narrow)
        return out.copy_(v.transpose(1, 2)).flatten(3)

    def tokens_first(self, name: str, v: Tensor) -> Tensor:
        """(b, G, R, Q, P) or (b, G, Q, R P) -> (b, Q, G, R, P) in the wide dtype."""
        v = v.permute(0, 3, 1, 2, 4) if v.dim() == 5 else v.unflatten(3, (self.R, self.P)).transpose(1, 2)
        return self.room(name, v.shape, self.x.dtype).copy_(v)

    def dot(self, name: str, v: Tensor, w: Tensor) -> Tensor:
        return dot(self.room, name, v, w)

    def through_state(self, vg: Tensor, state: Tensor) -> Tensor:
        """(b, G, Q, N) times a state (b, G, N, R P) -> (b, Q, G, R, P)."""
        return self.tokens_first("through_state", self.dot("through_state_g", vg, state))

    def into_state(self, vg: Tensor, wg: Tensor) -> Tensor:
        """Sum over tokens of v (outer) w: (b, G, Q, N), (b, G, Q, R P) -> (b, G, N, R, P)."""
        return self.dot("into_state", vg.transpose(2, 3), wg).unflatten(3, (self.R, self.P))

    def within(self, v: Tensor, transposed: bool = False) -> Tensor:
        """M v, or M^T v, for v (b, G, R, Q, P). Turns L into M."""
        M = self.room("M", self.L.shape, self.narrow).copy_(self.L.mul_(self.CB))
        return self.tokens_first("M_v_t", self.dot("M_v", M.transpose(3, 4) if transposed else M, v))


def state_first(state: Tensor, G: int) -> Tensor:
    """(b, H, P, N) -> (b, G, N, R, P), a fresh copy: the layout in which one matmul serves a group."""
    return state.unflatten(1, (G, -1)).permute(0, 1, 4, 2, 3).clone(memory_format=torch.contiguous_format)


def state_last(state: Tensor) -> Tensor:
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2)


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, documents, initial_state, chunk: int):
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        heads, spans, room = (G, H // G), spans_of(T, chunk), Scratch(x.device)
        decay = Decay.of(dt * A, G, documents, chunk)
        xg, dtg = x.unflatten(2, heads), dt.unflatten(2, heads)
        state = state_first(initial_state, G)
        states = torch.empty(len(spans), b, G, N, H // G * P, dtype=x.dtype, device=x.device)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        yg = y.unflatten(2, heads)
        for number, span in enumerate(spans):
            c = _Chunk(xg, dtg, B, C, decay, number, span, room)
            S_in = states[number].copy_(state.flatten(3))
            out = c.within(c.dtxh)
            out.addcmul_(c.through_state(c.Cg, S_in), c.enter)
            if D is not None:
                out.addcmul_(c.x, D.view(*heads, 1))
            yg[:, span] = out
            left = c.groups_first("left", c.dtx.mul_(c.leave))
            state.mul_(c.through).add_(c.into_state(c.Bg, left))
        ctx.save_for_backward(x, dt, A, B, C, D, documents, states)
        ctx.chunk = chunk
        return y, state_last(state)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        x, dt, A, B, C, D, documents, states = ctx.saved_tensors
        T, H = dt.shape[1:]
        G, chunk = B.shape[2], ctx.chunk
        heads, room = (G, H // G), Scratch(x.device)
        log_decay = dt * A
        decay = Decay.of(log_decay, G, documents, chunk)
        xg, dtg, dyg = x.unflatten(2, heads), dt.unflatten(2, heads), dy.unflatten(2, heads)
        dx, dB, dC = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, B, C))
        dxg, d_dt, dcs = dx.unflatten(2, heads), torch.empty_like(dtg), torch.empty_like(dtg)
        dD = None if D is None else torch.zeros(heads, dtype=D.dtype, device=D.device)
        d_state = state_first(d_final, G)  # of the state that leaves the chunk
        for number, span in reversed(list(enumerate(spans_of(T, chunk)))):
            c = _Chunk(xg, dtg, B, C, decay, number, span, room)
            S_in, dS_out = states[number], room("dS_out", states.shape[1:], x.dtype).copy_(d_state.flatten(3))
            d_out = room("dy", c.x.shape, dt.dtype).copy_(dyg[:, span])
            d_outh = c.heads_first("dyh", dyg[:, span])
            product = room("product", c.x.shape, dt.dtype)
            slopes = dcs[:, span]  # of cs

            # Y_i += enter_i C_i S_in
            entered = torch.mul(d_out, c.enter, out=product)
            enteredg = c.groups_first("entered", entered)
            torch.sum(entered.mul_(c.through_state(c.Cg, S_in)), -1, out=slopes)
            dCg = c.dot("dC", enteredg, S_in.transpose(2, 3))

            # S_out = through S_in + sum_j leave_j B_j (dt x)_j
            leftg = c.groups_first("left", torch.mul(c.dtx, c.leave, out=product))
            dBg = c.dot("dB", leftg, dS_out.transpose(2, 3))
            d_dtx = c.through_state(c.Bg, dS_out).mul_(c.leave)
            slope_leave = torch.mul(d_dtx, c.dtx, out=product).sum(-1)
            slope_through = (d_state * S_in.view_as(d_state)).sum((2, 4)).mul_(c.through[:, :, 0, :, 0])
            d_state.mul_(c.through).add_(c.into_state(c.Cg, enteredg))

            # Y_i += sum_j M_ij (dt x)_j with M = L o C B^T. Row and column sums of dM o M are taken from the same
            # float32 numbers, so that what cancels in the sum over tokens cancels exactly.
            dM = c.dot("dM", d_outh, c.dtxh.transpose(3, 4))
            dML = room("dML", c.L.shape, dt.dtype).copy_(dM).mul_(c.L)
            dCB = dML.sum(2).masked_fill_(c.hidden, 0).to(x.dtype)
            dML.mul_(c.CB)
            slopes.add_(dML.sum(-1).permute(0, 3, 1, 2)).sub_(dML.sum(-2).permute(0, 3, 1, 2)).sub_(slope_leave)
            slopes[:, -1] += slope_leave.sum(1).add_(slope_through)
            d_dtx.add_(c.within(d_outh, transposed=True))
            dC[:, span] = dCg.add_(c.dot("into_BC", dCB, c.Bg)).transpose(1, 2)
            dB[:, span] = dBg.add_(c.dot("into_BC", dCB.transpose(2, 3), c.Cg)).transpose(1, 2)

            torch.sum(torch.mul(d_dtx, c.x, out=product), -1, out=d_dt[:, span])
            d_dtx.mul_(c.dt)
            if D is not None and dD is not None:
                d_dtx.addcmul_(d_out, D.view(*heads, 1))
                dD += d_out.mul_(c.x).sum((0, 1, 4))
            dxg[:, span] = d_dtx

        d_log_decay = segment_sum(dcs.flatten(2), decay.key, chunk, reverse=True)
        d_log_decay.masked_fill_(
            log_decay < least_exponent(dt.dtype), 0
        )  # where it was bounded; else rounding times dt
        d_dt = d_dt.flatten(2).addcmul_(d_log_decay, A)
        dA = (d_log_decay * dt).sum((0, 1))
        return dx, d_dt, dA, dB, dC, None if dD is None else dD.flatten(), None, state_last(d_state), None
