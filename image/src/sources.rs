//! Debian's archive among the package sources of a host.
//!
//! See sources.list(5), and apt-get(8) on `indextargets`.

/// What [`Sources::choose`] reads: how apt-get is to tell of the sources.
pub(crate) const FORMAT: &str =
    "$(ORIGIN)|$(REPO_URI)|$(CODENAME)|$(SUITE)|$(RELEASE)|$(COMPONENT)";

/// Debian's keys, of the package debian-archive-keyring.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Suites that have neither updates nor security updates of their own.
const ROLLING: &[&str] = &["sid", "unstable", "experimental"];

/// Package sources for one suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sources {
    /// The suite, by its code name where that is known.
    pub(crate) suite: String,
    /// Whether the host has sources of the suite, and so perhaps its package lists.
    pub(crate) has_lists: bool,
    /// URI, suite, component.
    entries: Vec<[String; 3]>,
}

/// A package source of the host.
struct Entry<'a> {
    uri: &'a str,
    codename: &'a str,
    suite: &'a str,
    release: &'a str,
    component: &'a str,
}

impl Sources {
    /// The sources for `suite`, or for the host's own, from the output of apt-get: those that the host has, or
    /// else those at the same places. `None` if the host has nothing of Debian's archive.
    pub(crate) fn choose(targets: &str, suite: Option<&str>) -> Option<Sources> {
        let entries: Vec<Entry> = targets.lines().filter_map(Entry::parse).collect();
        let main = entries.iter().find(|entry| !entry.codename.contains('-'))?;
        let suite = match suite {
            None => main.codename,
            Some(suite) => entries
                .iter()
                .find(|entry| entry.suite == suite)
                .map_or(suite, |entry| entry.codename),
        };
        let parts = ["", "-updates", "-security"].map(|part| format!("{suite}{part}"));
        let source = |uri: &str, release: &str, component: &str| {
            [uri.to_owned(), release.to_owned(), component.to_owned()]
        };
        let has_lists = entries.iter().any(|entry| entry.codename == suite);
        let chosen = if has_lists {
            let of_suite = |entry: &&Entry| parts.iter().any(|part| part == entry.codename);
            let all = entries.iter().filter(of_suite);
            all.map(|entry| source(entry.uri, entry.release, entry.component))
                .collect()
        } else if ROLLING.contains(&suite) {
            vec![source(main.uri, suite, "main")]
        } else {
            let security = entries
                .iter()
                .find(|entry| entry.codename.ends_with("-security"));
            let mut chosen = vec![
                source(main.uri, &parts[0], "main"),
                source(main.uri, &parts[1], "main"),
            ];
            chosen.extend(security.map(|entry| source(entry.uri, &parts[2], "main")));
            chosen
        };
        Some(Sources {
            suite: suite.to_owned(),
            has_lists,
            entries: chosen,
        })
    }

    /// The file `sources.list`; with Debian's keyring, or with whatever keys apt trusts by itself.
    pub(crate) fn list(&self, keyring: bool) -> String {
        let option = match keyring {
            true => format!("[signed-by={KEYRING}] "),
            false => String::new(),
        };
        let line = |[uri, suite, component]: &[String; 3]| {
            format!("deb {option}{uri} {suite} {component}\n")
        };
        self.entries.iter().map(line).collect()
    }
}

impl Entry<'_> {
    fn parse(line: &str) -> Option<Entry<'_>> {
        let mut fields = line.trim().split('|');
        if fields.next()? != "Debian" {
            return None;
        }
        Some(Entry {
            uri: fields.next()?,
            codename: fields.next()?,
            suite: fields.next()?,
            release: fields.next()?,
            component: fields.next()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "\
        Other|http://o.example/|bookworm|stable|bookworm|main\n\
        Debian|http://m.example/s/|bookworm-security|stable-security|bookworm-security|main\n\
        Debian|http://m.example/d/|bookworm|stable|stable|main\n\
        Debian|http://m.example/d/|bookworm|stable|stable|contrib\n\
        $(ORIGIN)|http://n.example/|x|y|z|main\n";

    #[test]
    fn sources_for_a_suite() {
        let host = "deb http://m.example/s/ bookworm-security main\n\
                    deb http://m.example/d/ stable main\n\
                    deb http://m.example/d/ stable contrib\n";
        let newer = "deb http://m.example/d/ trixie main\n\
                     deb http://m.example/d/ trixie-updates main\n\
                     deb http://m.example/s/ trixie-security main\n";
        for (suite, has_lists, codename, list) in [
            (None, true, "bookworm", host),
            (Some("bookworm"), true, "bookworm", host),
            (Some("stable"), true, "bookworm", host),
            (Some("trixie"), false, "trixie", newer),
            (
                Some("sid"),
                false,
                "sid",
                "deb http://m.example/d/ sid main\n",
            ),
        ] {
            let sources = Sources::choose(HOST, suite).unwrap();
            assert_eq!(sources.suite, codename);
            assert_eq!(sources.has_lists, has_lists);
            assert_eq!(sources.list(false), list);
            let signed = format!("deb [signed-by={KEYRING}] http");
            assert!(sources.list(true).starts_with(&signed));
        }
        assert_eq!(Sources::choose("", None), None);
        assert_eq!(Sources::choose("$(ORIGIN)|a|b|c|d|e", Some("sid")), None);
    }
}
