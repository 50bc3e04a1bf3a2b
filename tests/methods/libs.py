"""How kd_losses/libs.py is called on random tensors; it has no vector."""

without_vector = (
    'no code of the authors is known; identities and a slow form are tested in tests/test_seeds.py'
)
cases = {
    'libs': """
loss = m.LIBS(4, 5)
k = torch.arange(n)
inputs = {'seq_s': S(n, 4), 'seq_t': T(n, 5), 'ctx_s': S(n, 3, 4), 'ctx_t': T(n, 3, 5), 'frm_s': S(n, 6, 4),
          'frm_t': T(n, 7, 5),
          'pairs': torch.cat([torch.stack([k, 0 * k + j, 0 * k + j], 1) for j in range(3)]),
          'mask_s': torch.ones(n, 6, dtype=torch.bool), 'mask_t': torch.ones(n, 7, dtype=torch.bool)}
""",
}
exceptions = {
    'layers': 'the linear maps',
    'no_gradcheck': 'the alignment of the frames is a constant by definition',
}
