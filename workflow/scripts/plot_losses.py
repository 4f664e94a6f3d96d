"""Draw every learned loss as a curve beside the standard loss."""

from evoloss.analysis.figure_losses import draw_losses
from evoloss.analysis.load import read_table
from evoloss.analysis.style import figure_style, save_figure
from evoloss.script_logging import script_logging

if __name__ == "__main__":
    with script_logging(snakemake), figure_style():
        figure = draw_losses(read_table(snakemake.input.losses))
        save_figure(figure, snakemake.output.svg, snakemake.output.png)
