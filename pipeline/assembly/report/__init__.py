"""The report: output folders are read and compared; `stages/report.py` lays the findings on a page."""
