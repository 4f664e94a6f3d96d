"""Draw what became of the candidates of every search."""

from evoloss.analysis.figure_filters import draw_filters
from evoloss.analysis.load import read_table
from evoloss.analysis.style import figure_style, save_figure
from evoloss.script_logging import script_logging

if __name__ == "__main__":
    with script_logging(snakemake), figure_style():
        figure = draw_filters(read_table(snakemake.input.searches))
        save_figure(figure, snakemake.output.svg, snakemake.output.png)
