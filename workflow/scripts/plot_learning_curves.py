"""Draw the learning curves of every method, mean with bands."""

from evoloss.analysis.figure_learning_curves import draw_learning_curves
from evoloss.analysis.load import read_table
from evoloss.analysis.style import figure_style, save_figure
from evoloss.script_logging import script_logging

if __name__ == "__main__":
    with script_logging(snakemake), figure_style():
        figure = draw_learning_curves(read_table(snakemake.input.runs))
        save_figure(figure, snakemake.output.svg, snakemake.output.png)
