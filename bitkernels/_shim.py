import math
import torch, torch.nn.functional as F
from bitkernels.reference import *  # noqa
from bitkernels import reference as R
def _seg(x):
    T = x.size(-1)
    c = x.cumsum(-1)
    s = c[..., :, None] - c[..., None, :]
    return s.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
def ssd_scan(x, dt, A, B, C, chunk_size=64, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, math.inf), return_final_states=False):
    if x.shape[1] % chunk_size or seq_idx is not None or cu_seqlens is not None:
        y, s = R.ssd_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit)
    else:
        d = dt + dt_bias if dt_bias is not None else dt
        if dt_softplus: d = F.softplus(d)
        b, T, H, P = x.shape; L = chunk_size; c = T // L; rep = H // B.shape[2]
        X = (x * d[..., None]).view(b, c, L, H, P); a = (d * A).view(b, c, L, H).permute(0, 3, 1, 2)
        Bc = B.repeat_interleave(rep, 2).view(b, c, L, H, -1); Cc = C.repeat_interleave(rep, 2).view(b, c, L, H, -1)
        ac = a.cumsum(-1)
        Lm = torch.exp(_seg(a))
        G = torch.einsum("bclhn,bcshn->bhcls", Cc, Bc)
        Y = torch.einsum("bhcls,bcshp->bclhp", G * Lm, X)
        dec = torch.exp(ac[..., -1:] - ac)
        st = torch.einsum("bclhn,bhcl,bclhp->bchpn", Bc, dec, X)
        h = x.new_zeros(b, H, P, B.shape[-1]) if initial_states is None else initial_states
        hs = []
        for i in range(c):
            hs.append(h); h = h * torch.exp(ac[:, :, i, -1])[..., None, None] + st[:, i]
        Y = Y + torch.einsum("bclhn,bchpn,bhcl->bclhp", Cc, torch.stack(hs, 1), torch.exp(ac))
        y = Y.reshape(b, T, H, P)
        if D is not None: y = y + (D if D.dim() == 2 else D[:, None]) * x
        if z is not None: y = y * F.silu(z)
        s = h
    return (y, s) if return_final_states else y
