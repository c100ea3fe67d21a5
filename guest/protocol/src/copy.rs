//! Where a copy goes: the rules of `cp -r`, as container tools have them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::message::FileKind;

/// What is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// What it is called.
    pub name: OsString,
    /// Only what is in the directory, not itself.
    pub contents: bool,
}

impl Source {
    /// The source at `path`: what ends in `/.` stands for its contents.
    pub fn of(path: &Path) -> Source {
        let bytes = path.as_os_str().as_bytes();
        let contents = bytes == b"." || bytes.ends_with(b"/.");
        Source {
            name: path.file_name().unwrap_or(OsStr::new("")).into(),
            contents: contents || path.file_name().is_none(),
        }
    }
}

/// Where the copy goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// A directory that exists.
    pub dir: PathBuf,
    /// What the copy is called there; `.`: what is in the source goes into `dir` itself.
    pub name: OsString,
}

/// Why a copy cannot go there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyError {
    /// The target is in a directory that does not exist.
    NoDirectory(PathBuf),
    /// The target ends in a slash and is no directory.
    NotADirectory(PathBuf),
    /// A directory cannot take a file's place.
    OverFile(PathBuf),
    /// A file cannot take a directory's place.
    OverDirectory(PathBuf),
}

impl std::fmt::Display for CopyError {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            CopyError::NoDirectory(path) => write!(f, "there is no directory {}", path.display()),
            CopyError::NotADirectory(path) => write!(f, "{} is not a directory", path.display()),
            CopyError::OverFile(path) => {
                write!(
                    f,
                    "{} is a file; it cannot become a directory",
                    path.display()
                )
            }
            CopyError::OverDirectory(path) => {
                write!(
                    f,
                    "{} is a directory; it cannot become a file",
                    path.display()
                )
            }
        }
    }
}

/// Where the copy of `source`, which is of kind `kind`, goes if the user names `path`. `look` tells what is at a path of that side,
/// where a symbolic link stands for what it leads to.
pub fn target<E: From<CopyError>>(
    source: &Source,
    kind: FileKind,
    path: &Path,
    look: &mut dyn FnMut(&Path) -> Result<Option<FileKind>, E>,
) -> Result<Target, E> {
    let directory = kind == FileKind::Directory;
    let slash = path.as_os_str().as_bytes().ends_with(b"/");
    match look(path)? {
        Some(FileKind::Directory) => {
            let name = match source.contents && directory {
                true => ".".into(),
                false => source.name.clone(),
            };
            let Target { dir, name } = Target {
                dir: path.into(),
                name,
            };
            let there = match name == "." {
                true => None,
                false => look(&dir.join(&name))?,
            };
            match there {
                Some(FileKind::Directory) if !directory => {
                    Err(CopyError::OverDirectory(dir.join(&name)).into())
                }
                Some(FileKind::Directory) | None => Ok(Target { dir, name }),
                Some(_) if directory => Err(CopyError::OverFile(dir.join(&name)).into()),
                Some(_) => Ok(Target { dir, name }),
            }
        }
        Some(_) if directory => Err(CopyError::OverFile(path.into()).into()),
        Some(_) if slash => Err(CopyError::NotADirectory(path.into()).into()),
        found => {
            if found.is_none() && slash && !directory {
                return Err(CopyError::NotADirectory(path.into()).into());
            }
            let dir = match path.parent() {
                Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
                Some(parent) => parent,
                None => Path::new("/"),
            };
            match (look(dir)?, path.file_name()) {
                (Some(FileKind::Directory), Some(name)) => Ok(Target {
                    dir: dir.into(),
                    name: name.into(),
                }),
                _ => Err(CopyError::NoDirectory(dir.into()).into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Told(String);

    impl From<CopyError> for Told {
        fn from(error: CopyError) -> Told {
            Told(error.to_string())
        }
    }

    #[test]
    fn as_cp_does_it() {
        // On the other side there are /d, /d/sub, /d/file and /file.
        let mut look = |path: &Path| -> Result<Option<FileKind>, Told> {
            Ok(match path.to_str().unwrap().trim_end_matches('/') {
                "" | "/d" | "/d/sub" | "." => Some(FileKind::Directory),
                "/file" | "/d/file" => Some(FileKind::File),
                _ => None,
            })
        };
        use FileKind::{Directory, File};
        for (source, kind, path, expected) in [
            ("a", File, "/d", "/d + a"),
            ("x/a", File, "/d/", "/d/ + a"),
            ("x/a", File, "/new", "/ + new"),
            ("a", File, "new", ". + new"),
            ("a", File, "/file", "/ + file"),
            ("a", File, "/new/", "/new/ is not a directory"),
            ("a", File, "/file/", "/file/ is not a directory"),
            ("a", File, "/no/new", "there is no directory /no"),
            (
                "sub",
                File,
                "/d",
                "/d/sub is a directory; it cannot become a file",
            ),
            ("dir", Directory, "/d", "/d + dir"),
            ("dir/", Directory, "/d", "/d + dir"),
            ("dir/.", Directory, "/d", "/d + ."),
            (".", Directory, "/d", "/d + ."),
            ("dir", Directory, "/new", "/ + new"),
            ("dir/.", Directory, "/new", "/ + new"),
            ("dir", Directory, "/new/", "/ + new"),
            (
                "dir",
                Directory,
                "/file",
                "/file is a file; it cannot become a directory",
            ),
            (
                "file",
                Directory,
                "/d",
                "/d/file is a file; it cannot become a directory",
            ),
            ("sub", Directory, "/d", "/d + sub"),
            ("dir", Directory, "/no/new", "there is no directory /no"),
        ] {
            let source = Source::of(Path::new(source));
            let got = match target(&source, kind, Path::new(path), &mut look) {
                Ok(Target { dir, name }) => format!("{} + {}", dir.display(), name.display()),
                Err(Told(text)) => text,
            };
            assert_eq!(got, expected, "{source:?} to {path}");
        }
    }
}
