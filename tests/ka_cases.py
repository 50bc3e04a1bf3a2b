"""For every amalgamation loss, how it is built and called on random tensors, as text: it also runs in an
interpreter that has nothing but the loss's file (test_standalone.py).

m is the loss's module, S(*shape) a student's tensor, T(*shape) a teacher's, n the batch size. Sets `loss` and
`inputs`; SIDE says whose map is which only where the names do not.
"""

CASES = {
    'afk': """
loss = m.AFK()
inputs = {'outs_s': [S(n, 3), S(n, 4)], 'outs_t': [T(n, 3), T(n, 4)]}
""",
    'cfl': """
loss = m.CFL(4, [5, 3], h_channels=3)
inputs = {'f_s': S(n, 4, 3, 5), 'f_ts': [T(n, 5, 3, 5), T(n, 3, 3, 5)]}
""",
    'cfl_fc': """
loss = m.CFL(4, [5, 3], h_channels=3, block='fc')
inputs = {'f_s': S(n, 4), 'f_ts': [T(n, 5), T(n, 3)]}
""",
    'concat_kd': """
loss = m.ConcatKD()
inputs = {'out_s': S(n, 7), 'outs_t': [T(n, 3), T(n, 4)]}
""",
    'concat_kd_parts': """
loss = m.ConcatKD(T=2.0, mode='parts', align='center')
inputs = {'out_s': S(n, 7), 'outs_t': [T(n, 3), T(n, 4)]}
""",
    'customize': """
loss = m.Customize([4, 6], [5, 8], [2, 4])
inputs = {'fms_s': [S(n, 4, 4, 5), S(n, 6, 2, 3)], 'fms_t': [T(n, 5, 4, 5), T(n, 8, 2, 3)],
          'out_s': S(n, 3), 'out_t': T(n, 3)}
""",
    'customize_target': """
loss = m.Customize([4, 6], None, [5, 8], scale_logits=False)
inputs = {'fms_s': [S(n, 4, 4, 5), S(n, 6, 2, 3)], 'fms_t': [T(n, 5, 4, 5), T(n, 8, 2, 3)],
          'out_s': S(n, 3), 'out_t': T(n, 3)}
""",
    'fedka': """
loss = m.FedKA(4, 6)
inputs = {'fm_s': S(n, 4, 3, 5), 'fm_t': T(n, 6, 3, 5)}
""",
    'ka_vit': """
loss = m.TokenAmalgamation()
inputs = {'toks_s': [S(n, 8, 5), S(n, 8, 5)], 'toks_t': [[T(n, 4, 5), T(n, 4, 5)], [T(n, 4, 5), T(n, 4, 5)]]}
""",
    'ka_vit_layer': """
loss = m.TokenAmalgamation('layer')
inputs = {'toks_s': [S(n, 8, 5)], 'toks_t': [[T(n, 5, 5)], [T(n, 3, 5)]]}
""",
    'layerwise': """
loss = m.LayerwiseKA(4, [5, 3])
inputs = {'fm_s': S(n, 4, 3, 5), 'fms_t': [T(n, 5, 3, 5), T(n, 3, 3, 5)]}
""",
    'ood_ka': """
loss = m.OODKAGenerator()
inputs = {'out_s': S(n, 7), 'outs_t': [S(n, 3), S(n, 4)],
          'fms_t': [[S(n, 5, 3, 5), S(n, 2, 2, 2)], [S(n, 6, 3, 5), S(n, 3, 2, 2)]],
          'd_fake': S(n, 1, 2, 2), 'bn_stats': [(S(n, 5, 3, 5), torch.zeros(5), torch.ones(5))]}
""",
    'recombination': """
loss = m.SoftFocal(gamma=2.0)
inputs = {'out_s': S(n, 5, 3, 4), 'out_t': T(n, 5, 3, 4)}
""",
    'sbm': """
loss = m.SBM()
inputs = {'outs_s': [S(n, 5, 3, 4), S(n, 1, 3, 4), S(n, 3, 3, 4)],
          'outs_t': [T(n, 5, 3, 4), T(n, 1, 3, 4), T(n, 3, 3, 4)]}
""",
    'sbm_2019': """
loss = m.SBM(('depth', 'seg'), seg='hard', depth='si', weights=[2, 1])
inputs = {'outs_s': [S(n, 1, 3, 4), S(n, 5, 3, 4)], 'outs_t': [T(n, 1, 3, 4), T(n, 5, 3, 4)]}
""",
    'soka': """
loss = m.SOKAFeature(2, (4, 1, 1))
inputs = {'fm_s': S(n, 4, 3, 5), 'fms_t': [T(n, 4, 3, 5), T(n, 4, 3, 5)]}
""",
    'subtask': """
loss = m.SubTask([0, 3], 6)
inputs = {'out_s': S(n, 2), 'out_adv': S(n, 4), 'out_t': T(n, 6)}
""",
    'transformer_ka': """
loss = m.TaskAmalgamation([[0, 2], [1]], 3)
inputs = {'out_s': {'logits': S(n, 5, 4), 'boxes': S(n, 5, 4).sigmoid()},
          'outs_t': [{'logits': T(n, 5, 3), 'boxes': T(n, 5, 4).sigmoid()},
                     {'logits': T(n, 4, 2), 'boxes': T(n, 4, 4).sigmoid()}]}
""",
    'transformer_ka_hint': """
loss = m.SeqHint(2, 5)
inputs = {'seq_s': S(8, n, 5), 'seqs_t': [T(4, n, 5), T(4, n, 5)]}
""",
    'transformer_ka_agg': """
loss = m.SeqAgg(2, 5, norm='layer')
inputs = {'seq_s': S(4, n, 5), 'seqs_t': [T(4, n, 5), T(4, n, 5)]}
""",
}


def file_of(case: str) -> str:
    """The loss file that a case is of."""
    files = (name for name in CASES if case == name or case.startswith(f'{name}_'))
    return min(files, key=len)
