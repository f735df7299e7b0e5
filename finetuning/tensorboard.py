"""A run's curve for TensorBoard, which is not among the requirements."""

from finetuning.errors import UserError


class TensorBoard:
    """Called with the Progress after each update, it adds what is new in it to an event file in the run's folder.

    Raises UserError where TensorBoard is not installed.
    """

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
        # A run that goes on writes its whole curve again, in place of what the folder's earlier files hold.
        self.open = lambda: SummaryWriter(folder, purge_step=0)
        self.writer = None  # opened with the first values
        self.written = {"curve": 0, "epochs": 0}  # rows

    def __call__(self, progress):
        for name, count in self.written.items():
            for row in getattr(progress, name)[count:]:
                self.write(**row)
                self.written[name] += 1

    def write(self, step, **values):
        """Write values such as `train_loss` at a step."""
        self.writer = self.writer or self.open()
        for key, value in values.items():
            split, kind = key.split("_")
            self.writer.add_scalar(f"{kind}/{split}", value, step)
        self.writer.flush()
