"""Results of trainings that are cut by evaluations every so many steps: train_dense.py and train_lm.py."""

from engine.record import Record, save_checkpoint, write_json


class StepRecord(Record):
    """A record whose rows are evaluations after a number of steps.

    data: what the figures are of; digits: of the figures in the headline.
    """

    data, digits = 'test data', 2

    def finish(self, weights: str, facts: dict) -> str:
        save_checkpoint(self.folder / weights, self._weights())
        prefix = self.key.partition('_')[0] + '_'
        last, best = (
            {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
            for row in (self.history[-1], self.best)
        )
        write_json(self.folder / 'results.json', facts | {
            'last': last | {'step': self.history[-1]['step']},
            'best': best | {'step': self.best['step'], 'selected_on': self.data},
            'curve': [round(row[self.key], 4) for row in self.history],
            'seconds': round(sum(row['seconds'] for row in self.history), 1),
            'recipe': self.math_args,
            **self.origin,
        })  # fmt: skip
        return ', '.join(f'{key} {value:.{self.digits}f}' for key, value in last.items())
