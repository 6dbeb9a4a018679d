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

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
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
class _Decay:
    """All decays of a row: they are small (one number per token and head), so they are computed at once.

    cs: (b, G, R, T), log-decay from the start of the token's run (its part of a document inside a chunk) through the
    token. enter: (b, T, G, R), factor of the state that enters the chunk. leave: (b, T, G, R), decay from the token to
    the chunk's end, 0 if another document ends there. through: (b, chunks, G, R), from the chunk's start to its end.
    key: (b, T), numbers the runs. index: (b, T), of documents, of which there are several unless `single`. future:
    (chunk, chunk) bool, above the diagonal.
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
    def of(log_decay: Tensor, groups: int, documents: Tensor | None, chunk: int) -> "_Decay":
        """log_decay: (b, T, H)."""
        b, T, H = log_decay.shape
        steps = torch.arange(T, device=log_decay.device)
        chunk_of = steps // chunk
        end_of = torch.clamp((chunk_of + 1) * chunk - 1, max=T - 1)
        index = torch.zeros_like(steps[None]).expand(b, T) if documents is None else documents.long()
        key = chunk_of * (T + 1) + index
        # What decays to nothing in one token may as well decay a little less: sums stay small, and so does their
        # rounding, which the difference of two of them keeps.
        cs = segment_sum(log_decay.clamp(min=_least(log_decay.dtype)), key, chunk)
        # A chunk continues the document of the last token before it; the first chunk continues index 0.
        before = torch.cat([torch.zeros_like(index[:, :1]), index[:, end_of[:-chunk:chunk]]], 1)  # (b, chunks)
        continues = (index == before[:, chunk_of])[..., None]
        at_end = (index == index[:, end_of])[..., None]
        enter = torch.where(continues, _exp_(cs.clone()), 0)
        leave = torch.where(at_end, _exp_(cs[:, end_of] - cs), 0)
        through = enter[:, end_of[::chunk]]
        shape = (groups, H // groups)
        return _Decay(
            cs.transpose(1, 2).reshape(b, *shape, T),
            enter.unflatten(2, shape),
            leave.unflatten(2, shape),
            through.unflatten(2, shape),
            key,
            index,
            documents is None,
            torch.ones(chunk, chunk, dtype=torch.bool, device=cs.device).triu(1),
        )

    def within(self, span: slice) -> Tensor:
        """(b, G, R, Q, Q): decay from token j to token i of the chunk; meaningless, but finite, where i sees no j."""
        cs = self.cs[..., span]
        Q = cs.shape[-1]
        out = torch.empty(*cs.shape, Q, dtype=cs.dtype, device=cs.device)  # else it takes an order that suits nobody
        return _exp_(torch.sub(cs[..., :, None], cs[..., None, :], out=out))

    def hidden(self, span: slice) -> Tensor:
        """(b, 1, Q, Q) or (Q, Q) bool: token i of the chunk does not see token j."""
        index = self.index[:, span]
        future = self.future[: index.shape[1], : index.shape[1]]
        return future if self.single else future | (index[:, :, None] != index[:, None])[:, None]


def _least(dtype: torch.dtype) -> float:
    return math.log(torch.finfo(dtype).tiny) / 2


def _exp_(log_decay: Tensor) -> Tensor:
    """exp in place, of nothing positive, and of nothing so small that products with it would be subnormal: those (and
    exp of -inf) are several times slower on a CPU. The bound, 1e-19 in float32, is far below rounding."""
    return log_decay.clamp_(_least(log_decay.dtype), 0).exp_()


def _spans(T: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, T)) for start in range(0, T, chunk)]


def _heads_first(x: Tensor, factor: Tensor) -> Tensor:
    """x (b, Q, G, R, P) times factor (b, Q, G, R) as (b, G, R, Q, P), contiguous, in x's dtype."""
    b, Q, G, R, P = x.shape
    out = torch.empty(b, G, R, Q, P, dtype=x.dtype, device=x.device)
    return torch.mul(x.permute(0, 2, 3, 1, 4), factor.permute(0, 2, 3, 1)[..., None], out=out)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x (b, Q, G, R, P) times factor (b, Q, G, R) as (b, G, Q, R P), in x's dtype."""
    b, Q, G, R, P = x.shape
    out = torch.empty(b, G, Q, R, P, dtype=x.dtype, device=x.device)
    torch.mul(x.transpose(1, 2), factor.transpose(1, 2)[..., None], out=out)
    return out.view(b, G, Q, R * P)


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, documents, initial_state, chunk: int):
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        R = H // G
        wide, spans = dt.dtype, _spans(T, chunk)
        decay = _Decay.of(dt * A, G, documents, chunk)
        xg, dtg = x.unflatten(2, (G, R)), dt.unflatten(2, (G, R))
        state = initial_state.view(b, G, R, P, N).permute(0, 1, 4, 2, 3).clone(memory_format=torch.contiguous_format)
        states = x.new_empty(len(spans), b, G, N, R * P)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        yg = y.view(b, T, G, R, P)
        for number, span in enumerate(spans):
            xc, dtc, Bc, Cc = xg[:, span], dtg[:, span], B[:, span].transpose(1, 2), C[:, span].transpose(1, 2)
            Q = xc.shape[1]
            L, hidden = decay.within(span), decay.hidden(span)
            CB = (Cc @ Bc.transpose(2, 3)).masked_fill_(hidden, 0).to(wide)[:, :, None]
            inside = L.mul_(CB).to(x.dtype) @ _heads_first(xc, dtc)  # (b, G, R, Q, P)
            states[number].copy_(state.view(b, G, N, R * P))
            entering = (Cc @ states[number]).view(b, G, Q, R, P).transpose(1, 2)
            out = torch.mul(entering, decay.enter[:, span, ..., None])
            out.add_(inside.permute(0, 3, 1, 2, 4))
            if D is not None:
                out.addcmul_(xc.to(wide), D.view(G, R, 1))
            yg[:, span].copy_(out)
            left = Bc.transpose(2, 3) @ _scaled(xc, decay.leave[:, span] * dtc)  # (b, G, N, R P)
            state.mul_(decay.through[:, number, :, None, :, None]).add_(left.view_as(state))
        ctx.save_for_backward(x, dt, A, B, C, D, documents, states)
        ctx.chunk = chunk
        return y, state.permute(0, 1, 3, 4, 2).reshape(b, H, P, N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, documents, states = ctx.saved_tensors
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        R, chunk, wide = H // G, ctx.chunk, dt.dtype
        log_decay = dt * A
        decay = _Decay.of(log_decay, G, documents, chunk)
        xg, dtg, dyg = x.unflatten(2, (G, R)), dt.unflatten(2, (G, R)), dy.unflatten(2, (G, R))
        dx, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, B, C))
        d_dt, dcs = torch.empty_like(dtg), torch.empty_like(dtg)  # (b, T, G, R)
        dD = None if D is None else torch.zeros_like(D).view(G, R)
        dstate = dfinal.view(b, G, R, P, N).permute(0, 1, 4, 2, 3).clone(memory_format=torch.contiguous_format)
        for number, span in reversed(list(enumerate(_spans(T, chunk)))):
            xc, dtc, dyc = xg[:, span], dtg[:, span], dyg[:, span]
            Bc, Cc = B[:, span].transpose(1, 2), C[:, span].transpose(1, 2)
            enter, leave, through = decay.enter[:, span], decay.leave[:, span], decay.through[:, number]
            Q, S_in = xc.shape[1], states[number]  # (b, G, N, R P)
            dS_out = dstate.to(x.dtype).view_as(S_in)
            slopes = dcs[:, span]

            # Y_i += enter_i C_i S_in
            dy_in = _scaled(dyc, enter)
            entering = (Cc @ S_in).view(b, G, Q, R, P).transpose(1, 2)
            torch.sum(entering.to(wide).mul_(dyc).mul_(enter[..., None]), -1, out=slopes)
            dCc = dy_in @ S_in.transpose(2, 3)

            # S_out = through S_in + sum_j leave_j B_j (dt x)_j
            from_state = (Bc @ dS_out).view(b, G, Q, R, P).transpose(1, 2).to(wide)
            from_state.mul_(leave[..., None])
            dBc = _scaled(xc, leave * dtc) @ dS_out.transpose(2, 3)
            slope_leave = torch.mul(from_state, xc).sum(-1).mul_(dtc)
            slope_through = (dstate * S_in.view_as(dstate)).sum((2, 4)).mul_(through)
            dstate.mul_(through[:, :, None, :, None]).add_((Cc.transpose(2, 3) @ dy_in).view_as(dstate))

            # Y_i += sum_j M_ij (dt x)_j with M = L o C B^T. Row and column sums of dM o M are taken from the same
            # float32 numbers, so that what cancels in the sum over tokens cancels exactly.
            L, hidden = decay.within(span), decay.hidden(span)
            CB = (Cc @ Bc.transpose(2, 3)).masked_fill_(hidden, 0).to(wide)[:, :, None]
            dyh = dyc.permute(0, 2, 3, 1, 4).contiguous()
            dML = (dyh @ _heads_first(xc, dtc).transpose(3, 4)).to(wide).mul_(L)
            from_inside = L.mul_(CB).to(x.dtype).transpose(3, 4) @ dyh
            dCB = dML.sum(2).masked_fill_(hidden, 0).to(x.dtype)
            dML.mul_(CB)
            slopes.add_(dML.sum(-1).permute(0, 3, 1, 2)).sub_(dML.sum(-2).permute(0, 3, 1, 2)).sub_(slope_leave)
            slopes[:, -1] += slope_leave.sum(1).add_(slope_through)
            dC[:, span].copy_(dCc.add_(dCB @ Bc).transpose(1, 2))
            dB[:, span].copy_(dBc.add_(dCB.transpose(2, 3) @ Cc).transpose(1, 2))

            # dt x, and the skip
            d_dtx = from_state.add_(from_inside.permute(0, 3, 1, 2, 4))
            torch.sum(d_dtx * xc, -1, out=d_dt[:, span])
            d_dtx.mul_(dtc[..., None])
            if D is not None:
                dyw = dyc.to(wide)
                d_dtx.addcmul_(dyw, D.view(G, R, 1))
                dD += (dyw * xc).sum((0, 1, 4))
            dx.view(b, T, G, R, P)[:, span].copy_(d_dtx)

        d_log_decay = segment_sum(dcs.view(b, T, H), decay.key, chunk, reverse=True)
        d_log_decay.masked_fill_(log_decay < _least(dt.dtype), 0)  # where it was bounded; else rounding times dt
        d_dt = d_dt.view(b, T, H).addcmul_(d_log_decay, A)
        dA = (d_log_decay * dt).sum((0, 1))
        d_initial = dstate.permute(0, 1, 3, 4, 2).reshape(b, H, P, N)
        return dx, d_dt, dA, dB, dC, None if dD is None else dD.view(H), None, d_initial, None
