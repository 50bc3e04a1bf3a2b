"""What reads results/ and the tables of methods, and writes tables, figures and pages of docs/."""
