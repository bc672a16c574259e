"""Variance compensation (Q&C, arXiv 2503.02508, Eq. 9-12), and how it works under samplers that are not ours.

Quantization and caching make a sample's variance drift away from that of the full-precision run. Before step t the
sample x of the accelerated run is therefore replaced by

    x~ = mu_t + K_t (x - mu_t),

with one mean and one factor per channel (`correction`). K_t is measured step by step, on trajectories that all earlier
corrections already went into (`fit`): factors of uncorrected runs would correct the same drift again at every step.

In our own loop x is simply replaced. A stock sampler owns its x: a wrapper around its model sees x, and can change the
prediction D that it returns, nothing else. But one step of a first-order sampler is x' = c1 x + c2 D (plus noise), so

    D' = D(x~) + (c1 / c2) (x~ - x)      gives      c1 x + c2 D' = c1 x~ + c2 D(x~),

which is the step from x~ (`shifted`). For Euler and DDIM c1 = s'/s, for DDPM c1 = (s'/s)^2, and c2 = 1 - c1; other
samplers get Euler's and are approximate: multi-step ones also carry the shifted prediction into their history. The last
step has c1 = 0. It costs one multiplication of the sample per step.

mu, K and the fit's eps are in variance-preserving units, x / sqrt(1 + s^2); flow models are in such units already. A
latent of several parts (video and audio) has factors for the channels of each part, in order.
"""
