"""The commands that show rows: `preview` of files, `inspection` of a dataset; `segments` -> `printing`."""
