"""The tuner: it records uncached runs, calibrates schedules by them, tries candidates and keeps what fits a wish."""
