"""The report: lines of answers become counts, counts become figures, figures become tables, pictures and a page.

`reading` and `saved` make runs of `cells`; `figures` views them; `sections/` says what is told of them; `tables` and
`pictures` say what that looks like; `files` writes it all.
"""
