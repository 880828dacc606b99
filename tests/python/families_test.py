#!/usr/bin/env python3
"""What transformers' Qwen3-MoE, Mixtral, DeepSeek-V3 and gpt-oss compute, without torch: their layouts and formulas in numpy.

transformers_test.py runs the classes themselves where torch and transformers are; this runs everywhere. Formulas are
those of the modeling files of transformers 5.23: the router, the fused weights' layout, the activation.
"""
import unittest

from package import bf16, fourmoe, np, relative_l2, sigmoid

T, E, H, I, K = 23, 8, 64, 48, 3
BOUND = 5e-4  # as in python_package_test.py


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def best(scores, count):
    """Ids of the largest scores of each row, in falling order."""
    return np.argsort(-scores, 1, kind="stable")[:, :count]


def combine(x, ids, weights, expert):
    out = np.zeros((len(x), H))
    for t, p in np.ndindex(*ids.shape):
        out[t] += weights[t, p] * expert(ids[t, p], bf16(x[t]))
    return out


class Families(unittest.TestCase):
    def setUp(self):
        self.random = np.random.default_rng(7)
        self.x = self.random.standard_normal((T, H)).astype(np.float32)
        self.router = self.random.standard_normal((E, H)).astype(np.float32) / 4
        self.logits = (self.x.astype(np.float64) @ self.router.T.astype(np.float64)).astype(np.float32)
        self.gate_up = self.random.standard_normal((E, 2 * I, H)).astype(np.float32) / 4  # gate's rows, then up's
        self.down = self.random.standard_normal((E, H, I)).astype(np.float32) / 4

    def silu_expert(self, e, x):
        gate, up = np.split(self.gate_up[e].astype(np.float64) @ x, 2)
        return self.down[e].astype(np.float64) @ bf16(gate * sigmoid(gate) * up)

    def check(self, ids, weights, expected_ids, expected_weights, layer, expected):
        np.testing.assert_array_equal(np.sort(ids, 1), np.sort(expected_ids, 1))
        np.testing.assert_allclose(np.sort(weights, 1), np.sort(expected_weights, 1), rtol=1e-5)
        self.assertLess(relative_l2(layer(self.x, ids, weights), expected), BOUND)
        self.assertLess(relative_l2(layer(self.x, router_logits=self.logits), expected), BOUND)

    def halves(self, **routing):
        return fourmoe.pack(gate=self.gate_up[:, :I], up=self.gate_up[:, I:], down=self.down, top_k=K, **routing)

    def test_qwen3_moe(self):
        probabilities = softmax(self.logits.astype(np.float64))
        for renormalise in (True, False):  # norm_topk_prob
            ids = best(probabilities, K)
            weights = np.take_along_axis(probabilities, ids, 1)
            if renormalise:
                weights /= weights.sum(1, keepdims=True)
            found = fourmoe.route(self.logits, top_k=K, renormalise=renormalise)
            self.check(*found, ids, weights, self.halves(renormalise=renormalise),
                       combine(self.x, ids, weights, self.silu_expert))

    def test_mixtral(self):
        ids = best(self.logits, K)
        weights = softmax(np.take_along_axis(self.logits.astype(np.float64), ids, 1))
        self.check(*fourmoe.route(self.logits, top_k=K), ids, weights, self.halves(),
                   combine(self.x, ids, weights, self.silu_expert))

    def test_deepseek_v3(self):
        groups, kept, scale = 4, 2, 2.5
        bias = self.random.standard_normal(E).astype(np.float32) / 4  # e_score_correction_bias
        scores = sigmoid(self.logits.astype(np.float64))
        choice = scores + bias
        of_groups = np.sort(choice.reshape(T, groups, -1), 2)[:, :, -2:].sum(2)
        mask = np.zeros((T, groups), bool)
        np.put_along_axis(mask, best(of_groups, kept), True, 1)
        ids = best(np.where(np.repeat(mask, E // groups, 1), choice, -np.inf), K)
        weights = np.take_along_axis(scores, ids, 1)
        weights = weights / (weights.sum(1, keepdims=True) + 1e-20) * scale
        routing = {"score": "sigmoid", "groups": groups, "groups_kept": kept, "scale": scale, "selection_bias": bias}
        self.check(*fourmoe.route(self.logits, top_k=K, **routing), ids, weights, self.halves(**routing),
                   combine(self.x, ids, weights, self.silu_expert))

    def test_gpt_oss(self):
        alpha, limit = 1.702, 7.0
        fused = np.ascontiguousarray(4 * self.gate_up.transpose(0, 2, 1))  # [E, H, 2I], gate and up alternate
        down = np.ascontiguousarray(self.down.transpose(0, 2, 1))  # [E, I, H]
        fused_bias, down_bias = (self.random.standard_normal((E, n)).astype(np.float32) for n in (2 * I, H))

        def expert(e, x):
            both = x @ fused[e].astype(np.float64) + fused_bias[e]
            gate, up = np.minimum(both[::2], limit), np.clip(both[1::2], -limit, limit)
            return bf16((up + 1) * gate * sigmoid(alpha * gate)) @ down[e].astype(np.float64) + down_bias[e]

        ids = best(self.logits, K)
        weights = softmax(np.take_along_axis(self.logits.astype(np.float64), ids, 1))
        rows = np.ascontiguousarray(fused.transpose(0, 2, 1))
        layer = fourmoe.pack(
            gate=rows[:, ::2], up=rows[:, 1::2], down=np.ascontiguousarray(down.transpose(0, 2, 1)), top_k=K,
            gate_bias=fused_bias[:, ::2].copy(), up_bias=fused_bias[:, 1::2].copy(), down_bias=down_bias,
            activation="swiglu_clamped", alpha=alpha, beta=1.0, limit=limit)
        self.check(*fourmoe.route(self.logits, top_k=K), ids, weights, layer, combine(self.x, ids, weights, expert))


if __name__ == "__main__":
    unittest.main()
