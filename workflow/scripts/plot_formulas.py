"""Draw the learned losses as typeset formulas."""

from evoloss.analysis.figure_formulas import FIGURE_SETTINGS, draw_formulas
from evoloss.analysis.load import read_table
from evoloss.analysis.style import figure_style, save_figure
from evoloss.script_logging import script_logging

if __name__ == "__main__":
    with script_logging(snakemake), figure_style(**FIGURE_SETTINGS):
        figure = draw_formulas(read_table(snakemake.input.losses))
        save_figure(figure, snakemake.output.svg, snakemake.output.png)
