"""Draw the final test error of every method: mean, spread and single runs."""

from evoloss.analysis.figure_test_error import draw_test_error
from evoloss.analysis.load import read_table
from evoloss.analysis.style import figure_style, save_figure
from evoloss.script_logging import script_logging

if __name__ == "__main__":
    with script_logging(snakemake), figure_style():
        figure = draw_test_error(
            read_table(snakemake.input.final), read_table(snakemake.input.comparison)
        )
        save_figure(figure, snakemake.output.svg, snakemake.output.png)
