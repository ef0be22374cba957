//! Reads a TOML tree key by key, and remembers everything that is wrong with it.

use std::{cell::RefCell, rc::Rc, time::Duration};

use toml::de::{DeTable, DeValue};

use super::{
    diagnostic::{Diagnostic, Place},
    units,
};

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) kind: Kind,
    pub(super) place: Place,
}

/// What a value is.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Text(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    List(Vec<Value>),
    Table(Vec<Entry>),
    Other,
}

/// A key with its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) place: Place,
    pub(super) value: Value,
}

/// The tree of a file.
pub(super) fn tree(table: &DeTable<'_>) -> Vec<Entry> {
    let entries = table.iter().map(|(key, value)| Entry {
        key: key.get_ref().to_string(),
        place: Place::File(key.span()),
        value: self::value(value.get_ref(), value.span()),
    });
    entries.collect()
}

fn value(value: &DeValue<'_>, span: std::ops::Range<usize>) -> Value {
    let kind = match value {
        DeValue::String(text) => Kind::Text(text.to_string()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or(Kind::Other, Kind::Integer)
        }
        DeValue::Float(number) => number.as_str().parse().map_or(Kind::Other, Kind::Float),
        DeValue::Boolean(yes) => Kind::Boolean(*yes),
        DeValue::Array(list) => {
            Kind::List(list.iter().map(|v| self::value(v.get_ref(), v.span())).collect())
        }
        DeValue::Table(table) => Kind::Table(tree(table)),
        DeValue::Datetime(_) => Kind::Other,
    };
    Value { kind, place: Place::File(span) }
}

/// Puts `value` of the environment variable `variable` at `path`, over what the file says.
pub(super) fn set(entries: &mut Vec<Entry>, path: &[String], variable: &str, text: &str) {
    let place = Place::Environment(variable.to_owned());
    let Some((first, rest)) = path.split_first() else { return };
    let found = entries.iter().position(|entry| entry.key.eq_ignore_ascii_case(first));
    let index = found.unwrap_or_else(|| {
        let value = Value { kind: Kind::Table(Vec::new()), place: place.clone() };
        entries.push(Entry { key: first.clone(), place: place.clone(), value });
        entries.len() - 1
    });
    let Some(entry) = entries.get_mut(index) else { return };
    if rest.is_empty() {
        entry.place = place.clone();
        entry.value = Value { kind: scalar(text), place };
        return;
    }
    match (&mut entry.value.kind, rest.first().and_then(|next| next.parse::<usize>().ok())) {
        // A number names a place in a list of tables: LITEGATE__LISTENER__0__ADDRESS.
        (Kind::List(list), Some(index)) => {
            if let Some(Value { kind: Kind::Table(inner), .. }) = list.get_mut(index) {
                set(inner, rest.get(1..).unwrap_or_default(), variable, text);
            }
        }
        (Kind::Table(inner), _) => set(inner, rest, variable, text),
        (kind, _) => {
            let mut inner = Vec::new();
            set(&mut inner, rest, variable, text);
            *kind = Kind::Table(inner);
            entry.value.place = place;
        }
    }
}

/// A variable's text as the TOML value it looks like; text where it looks like none.
fn scalar(text: &str) -> Kind {
    let wrapped = format!("v = {text}");
    match DeTable::parse(&wrapped) {
        Ok(table) => match tree(table.get_ref()).pop() {
            Some(entry) if entry.key == "v" => entry.value.kind,
            _ => Kind::Text(text.to_owned()),
        },
        Err(_) => Kind::Text(text.to_owned()),
    }
}

/// Where faults go.
pub(super) type Faults = Rc<RefCell<Vec<Diagnostic>>>;

/// One table being read. Whatever was not asked for when it is dropped is an unknown key.
#[derive(Debug)]
pub(super) struct Section {
    /// For messages: `[cluster.abaci.hold]`.
    pub(super) name: String,
    pub(super) place: Place,
    entries: Vec<Entry>,
    known: Vec<&'static str>,
    /// Those of them that are written, and how many faults there were before they were read.
    written: Vec<(&'static str, usize)>,
    faults: Faults,
}

impl Section {
    pub(super) fn new(name: &str, place: Place, entries: Vec<Entry>, faults: &Faults) -> Self {
        let name = name.to_owned();
        let faults = Rc::clone(faults);
        Self { name, place, entries, known: Vec::new(), written: Vec::new(), faults }
    }

    /// Remembers a fault.
    pub(super) fn fault(
        &self,
        place: &Place,
        message: String,
        label: String,
        help: Option<String>,
    ) {
        let place = place.clone();
        self.faults.borrow_mut().push(Diagnostic { message, place, label, help });
    }

    pub(super) fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        let index = self.entries.iter().position(|entry| entry.key == key)?;
        self.written.push((key, self.faults.borrow().len()));
        Some(self.entries.remove(index).value)
    }

    /// Whether a key is written, rightly or wrongly.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.key == key)
    }

    /// All that is left, with names that the operator chose.
    pub(super) fn take_all(&mut self) -> Vec<Entry> {
        std::mem::take(&mut self.entries)
    }

    /// All that is left is nobody's: what its keys mean depends on `key`, which is wrong or missing.
    /// Only what may be `key` misspelt is still told of.
    pub(super) fn forget_but(&mut self, key: &str) {
        self.entries.retain(|entry| closest(&entry.key, std::iter::once(key)).is_some());
    }

    /// A table below this one; empty where it is not written.
    pub(super) fn section(&mut self, key: &'static str) -> Self {
        let name =
            if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) };
        match self.take(key) {
            None => Self::new(&name, self.place.clone(), Vec::new(), &self.faults),
            Some(value) => self.table(&name, key, value),
        }
    }

    /// A value that must be a table.
    pub(super) fn table(&self, name: &str, key: &str, value: Value) -> Self {
        match value.kind {
            Kind::Table(entries) => Self::new(name, value.place, entries, &self.faults),
            other => {
                self.wrong(
                    key,
                    &Value { kind: other, place: value.place.clone() },
                    "a table",
                    None,
                );
                Self::new(name, value.place, Vec::new(), &self.faults)
            }
        }
    }

    pub(super) fn wrong(&self, key: &str, value: &Value, wanted: &str, help: Option<&str>) {
        let is = match &value.kind {
            Kind::Text(_) => "this is text",
            Kind::Integer(_) | Kind::Float(_) => "this is a bare number",
            Kind::Boolean(_) => "this is true or false",
            Kind::List(_) => "this is a list",
            Kind::Table(_) => "this is a table",
            Kind::Other => "this is something else",
        };
        let message = format!("`{key}` needs {wanted}");
        self.fault(&value.place, message, is.to_owned(), help.map(str::to_owned));
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        read: impl FnOnce(&Kind) -> Option<Result<T, String>>,
    ) -> Option<T> {
        let value = self.take(key)?;
        match read(&value.kind) {
            Some(Ok(read)) => return Some(read),
            Some(Err(help)) => {
                let message = format!("`{key}` needs {wanted}");
                let label = "not like this".to_owned();
                self.fault(&value.place, message, label, Some(help));
            }
            None => self.wrong(key, &value, wanted, None),
        }
        None
    }

    pub(super) fn text(&mut self, key: &'static str) -> Option<String> {
        self.read(key, "text", |kind| match kind {
            Kind::Text(text) => Some(Ok(text.clone())),
            _ => None,
        })
    }

    /// Text that `parse` understands.
    pub(super) fn parsed<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        self.read(key, wanted, |kind| match kind {
            Kind::Text(text) => Some(parse(text)),
            _ => None,
        })
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        self.read(key, "true or false", |kind| match kind {
            Kind::Boolean(yes) => Some(Ok(*yes)),
            _ => None,
        })
        .unwrap_or(default)
    }

    pub(super) fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        let value = self.take(key);
        let Some(value) = value else { return default };
        match &value.kind {
            Kind::Text(text) => match units::duration(text) {
                Ok(duration) => return duration,
                Err(help) => self.wrong(key, &value, "a number and a unit", Some(help)),
            },
            Kind::Integer(n) => {
                let help = format!("\"{n}s\"; units are ms, s, m, h");
                self.wrong(key, &value, "a number and a unit", Some(&help));
            }
            _ => self.wrong(key, &value, "a duration", Some("like \"5s\"")),
        }
        default
    }

    pub(super) fn size(&mut self, key: &'static str, default: usize) -> usize {
        self.read(key, "a size", |kind| match kind {
            Kind::Text(text) => Some(units::size(text).map_err(str::to_owned)),
            Kind::Integer(n) => Some(usize::try_from(*n).map_err(|_| "like \"64KiB\"".to_owned())),
            _ => None,
        })
        .unwrap_or(default)
    }

    pub(super) fn integer(
        &mut self,
        key: &'static str,
        range: std::ops::RangeInclusive<i64>,
    ) -> Option<i64> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        self.read(key, &wanted, |kind| match kind {
            Kind::Integer(n) if range.contains(n) => Some(Ok(*n)),
            Kind::Integer(n) => Some(Err(format!("{n} is out of range"))),
            _ => None,
        })
    }

    pub(super) fn count(&mut self, key: &'static str, least: i64, default: usize) -> usize {
        let read = self.integer(key, least..=1_000_000_000);
        read.and_then(|n| usize::try_from(n).ok()).unwrap_or(default)
    }

    pub(super) fn share(&mut self, key: &'static str, default: f64) -> f64 {
        self.read(key, "a share from 0 to 1", |kind| {
            let share = match kind {
                Kind::Float(share) => *share,
                #[expect(clippy::cast_precision_loss, reason = "only 0 and 1 are accepted")]
                Kind::Integer(n) => *n as f64,
                _ => return None,
            };
            let fits = (0.0..=1.0).contains(&share);
            Some(if fits { Ok(share) } else { Err("like 0.5".to_owned()) })
        })
        .unwrap_or(default)
    }

    /// One of a few words.
    pub(super) fn word<T: Copy>(
        &mut self,
        key: &'static str,
        words: &[(&str, T)],
        default: T,
    ) -> T {
        self.choice(key, words).unwrap_or(default)
    }

    /// One of a few words, where none is the default.
    pub(super) fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Option<T> {
        let all: Vec<_> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        let wanted = format!("one of {}", all.join(", "));
        self.parsed(key, &wanted, |text| {
            let found = words.iter().find(|(word, _)| *word == text);
            found.map(|(_, value)| *value).ok_or_else(|| {
                let near = closest(text, words.iter().map(|(word, _)| *word));
                near.map_or_else(|| wanted.clone(), |near| format!("did you mean \"{near}\"?"))
            })
        })
    }

    /// A list, or a single value in place of a list of one.
    pub(super) fn list(&mut self, key: &'static str) -> Vec<Value> {
        match self.take(key) {
            None => Vec::new(),
            Some(Value { kind: Kind::List(list), .. }) => list,
            Some(single) => vec![single],
        }
    }

    /// A list of texts, each of which `parse` understands.
    pub(super) fn texts<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        let mut all = Vec::new();
        for value in self.list(key) {
            match &value.kind {
                Kind::Text(text) => match parse(text) {
                    Ok(parsed) => all.push(parsed),
                    Err(help) => {
                        let message = format!("`{key}` needs {wanted}");
                        self.fault(&value.place, message, "not like this".to_owned(), Some(help));
                    }
                },
                _ => self.wrong(key, &value, wanted, None),
            }
        }
        all
    }

    /// Says that a key is missing. Where it is there and wrong, or misspelt, that is said already.
    pub(super) fn missing(&self, key: &str, help: &str) {
        let is_meant = |entry: &Entry| {
            closest(&entry.key, self.known.iter().copied()).is_some_and(|meant| meant == key)
        };
        let faults = self.faults.borrow().len();
        let is_wrong = self.written.iter().any(|(known, before)| *known == key && faults > *before);
        if is_wrong || self.entries.iter().any(is_meant) {
            return;
        }
        let message = if self.name.is_empty() {
            format!("`{key}` is missing")
        } else {
            format!("`{key}` is missing in [{}]", self.name)
        };
        self.fault(&self.place, message, "here".to_owned(), Some(help.to_owned()));
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        for entry in &self.entries {
            let near = closest(&entry.key, self.known.iter().copied());
            let inside = if self.name.is_empty() {
                "at the top level".to_owned()
            } else {
                format!("in [{}]", self.name)
            };
            let help = near.map_or_else(
                || format!("known keys are {}", self.known.join(", ")),
                |near| format!("did you mean `{near}`?"),
            );
            self.fault(&entry.place, format!("unknown key `{}`", entry.key), inside, Some(help));
        }
    }
}

/// The known word that is most like `word`, if it is like enough to be meant.
fn closest<'w>(word: &str, known: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    known
        .map(|known| (strsim::damerau_levenshtein(word, known), known))
        .filter(|(distance, known)| *distance <= known.len().max(3) / 3)
        .min()
        .map(|(_, known)| known)
}
