//! What is wrong with a configuration: where, what, and the cure.

use std::{fmt, ops::Range};

/// One fault.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Diagnostic {
    /// What is wrong.
    pub message: String,
    /// Where.
    pub place: Place,
    /// What is marked there.
    pub label: String,
    /// What to do.
    pub help: Option<String>,
}

/// Where a value comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Place {
    /// Bytes of the file.
    File(Range<usize>),
    /// An environment variable.
    Environment(String),
}

/// All faults of one configuration, with the text that they are about.
#[derive(Clone, Debug)]
pub struct Diagnostics {
    /// The file's name, as it was given.
    pub file: String,
    /// The file's text.
    pub text: String,
    /// At least one.
    pub all: Vec<Diagnostic>,
}

impl std::error::Error for Diagnostics {}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.render(f, false)
    }
}

impl Diagnostics {
    /// With colours for a terminal.
    pub fn coloured(&self) -> String {
        struct Coloured<'d>(&'d Diagnostics);
        impl fmt::Display for Coloured<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.render(f, true)
            }
        }
        Coloured(self).to_string()
    }

    fn render(&self, f: &mut fmt::Formatter<'_>, colour: bool) -> fmt::Result {
        let (red, blue, bold, off) = if colour {
            ("\x1b[1;31m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m")
        } else {
            ("", "", "", "")
        };
        for diagnostic in &self.all {
            let Diagnostic { message, label, help, .. } = diagnostic;
            writeln!(f, "{red}error{off}{bold}: {message}{off}")?;
            let mut margin = String::from(" ");
            match &diagnostic.place {
                Place::Environment(variable) => {
                    writeln!(f, "  {blue}-->{off} environment variable {variable}")?;
                    if !label.is_empty() {
                        writeln!(f, "   {blue}={off} {label}")?;
                    }
                }
                Place::File(span) => {
                    let Spot { line, column, text, carets } = self.spot(span);
                    margin = " ".repeat(line.to_string().len());
                    writeln!(f, "{margin}{blue}-->{off} {}:{line}:{column}", self.file)?;
                    writeln!(f, "{margin} {blue}|{off}")?;
                    writeln!(f, "{blue}{line} |{off} {text}")?;
                    let indent = " ".repeat(column - 1);
                    let carets = "^".repeat(carets);
                    writeln!(f, "{margin} {blue}|{off} {indent}{red}{carets} {label}{off}")?;
                }
            }
            if let Some(help) = help {
                writeln!(f, "{margin} {blue}={off} help: {help}")?;
            }
            writeln!(f)?;
        }
        let count = self.all.len();
        write!(f, "{count} error{}", if count == 1 { "" } else { "s" })
    }

    /// Line and column, counted from 1, of the first byte of `span`; the caret stays on its line.
    fn spot(&self, span: &Range<usize>) -> Spot<'_> {
        let start = self.text.floor_char_boundary(span.start.min(self.text.len()));
        let before = self.text.get(..start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let rest = self.text.get(line_start..).unwrap_or_default();
        let text = rest.lines().next().unwrap_or_default();
        let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
        // A span may begin at the line's end, which is no part of it.
        let line_end = (line_start + text.len()).max(start);
        let end = self.text.floor_char_boundary(span.end.clamp(start, line_end));
        let carets = self.text.get(start..end).unwrap_or_default().chars().count().max(1);
        Spot { line: before.matches('\n').count() + 1, column, text, carets }
    }
}

struct Spot<'t> {
    line: usize,
    column: usize,
    text: &'t str,
    carets: usize,
}
