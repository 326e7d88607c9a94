//! Roots as URLs: decides which texts are URLs, and parses them.

use crate::error::{Error, Result};
use std::fmt;
use std::path::{Path, PathBuf};

/// A URL of the form `scheme://bucket/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Url {
    pub scheme: String,
    /// The bucket, or container.
    pub bucket: String,
    /// The path in the bucket, without slashes at its ends.
    pub path: String,
}

/// True for a path that is the URL of an object store, or is meant as one.
pub fn is_url(path: &Path) -> bool {
    !matches!(Place::of(path), Ok(Place::Directory(_)))
}

/// The schemes of roots.
const SCHEMES: &str = "s3, gs, az or file";

/// The kinds of roots.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Directory(PathBuf),
    Store(Url),
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.bucket)?;
        if self.path.is_empty() { Ok(()) } else { write!(f, "/{}", self.path) }
    }
}

impl Url {
    /// Parses a URL of any scheme.
    ///
    /// # Errors
    /// `Invalid` for a text that is not a URL of this form.
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = |why: &str| Error::invalid(why).with_path(shown(text));
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(invalid("not a URL: write scheme://bucket/prefix"));
        };
        if !is_scheme(scheme) {
            return Err(invalid("not a URL: its scheme is not one word"));
        }
        let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(invalid("the URL names no bucket: write scheme://bucket/prefix"));
        }
        if rest.contains(['?', '#', '@']) {
            let why = "a URL of a root has no query, fragment or credentials: set credentials in the environment";
            return Err(invalid(why));
        }
        let path = path.trim_matches('/');
        if path.split('/').any(|part| matches!(part, "." | "..") || part.is_empty() && !path.is_empty()) {
            return Err(invalid("a URL of a root has no empty part, `.` or `..` in its path"));
        }
        Ok(Self { scheme: scheme.to_ascii_lowercase(), bucket: bucket.into(), path: path.into() })
    }

    /// The URL, if `path` is one. None for the path of a directory.
    ///
    /// # Errors
    /// `Invalid` for a text that is meant as a URL but is not a valid one.
    #[cfg(feature = "object-store")]
    pub fn of(path: &Path) -> Result<Option<Self>> {
        match Place::of(path)? {
            Place::Directory(_) => Ok(None),
            Place::Store(url) => Ok(Some(url)),
        }
    }
}

impl Place {
    /// What `path` names.
    ///
    /// # Errors
    /// `Invalid` for a text that is meant as a URL but cannot name a root.
    pub fn of(path: &Path) -> Result<Self> {
        let Some(text) = path.to_str() else { return Ok(Self::Directory(path.into())) };
        let Some((scheme, rest)) = text.split_once(':').filter(|(scheme, _)| is_scheme(scheme)) else {
            return Ok(Self::Directory(path.into()));
        };
        let lower = scheme.to_ascii_lowercase();
        let known = matches!(&*lower, "s3" | "s3a" | "gs" | "gcs" | "az" | "azure" | "abfs" | "abfss" | "file");
        if !rest.starts_with("//") {
            if known && rest.starts_with('/') && !path.exists() {
                let why = "a URL has two slashes after its scheme; a path library has removed one: give a string";
                return Err(Error::invalid(why).with_path(shown(text)));
            }
            return Ok(Self::Directory(path.into()));
        }
        match &*lower {
            "file" => match rest.strip_prefix("//").and_then(|rest| rest.strip_prefix("localhost").or(Some(rest))) {
                Some(directory) if directory.starts_with('/') => Ok(Self::Directory(directory.into())),
                _ => Err(Error::invalid("a file URL has three slashes: file:///directory").with_path(shown(text))),
            },
            "s3" | "gs" | "az" | "memory" => Url::parse(text).map(Self::Store),
            "s3a" | "gcs" | "azure" | "abfs" | "abfss" => {
                let why = format!("a root has another scheme: {SCHEMES}");
                Err(Error::invalid(format!("{why} scheme={scheme:?}")).with_path(shown(text)))
            }
            _ => {
                let why = format!("a root is a path, or a URL whose scheme is {SCHEMES}");
                Err(Error::invalid(format!("{why} scheme={scheme:?}")).with_path(shown(text)))
            }
        }
    }
}

/// The parts of a path to a step.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum StepPlace {
    Directory(PathBuf),
    /// The root, and the name of the step in it.
    Store(PathBuf, String),
}

impl StepPlace {
    /// What `path` names.
    ///
    /// # Errors
    /// As [`Place::of`]; `Invalid` for a URL that has no step in its path.
    pub fn of(path: &Path) -> Result<Self> {
        let mut url = match Place::of(path)? {
            Place::Directory(path) => return Ok(Self::Directory(path)),
            Place::Store(url) => url,
        };
        let (parent, name) = url.path.rsplit_once('/').unwrap_or(("", &url.path));
        if name.is_empty() {
            let why = "the URL names a bucket and no step: write scheme://bucket/prefix/step-00000001";
            return Err(Error::invalid(why).with_path(url.to_string()));
        }
        let (parent, name) = (parent.to_owned(), name.to_owned());
        url.path = parent;
        Ok(Self::Store(url.to_string().into(), name))
    }
}

/// True for a word that can be a scheme and is not a drive letter.
fn is_scheme(text: &str) -> bool {
    text.len() > 1
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

/// A text for an error, without the parts that may be secret.
fn shown(text: &str) -> String {
    let text = text.split(['?', '#']).next().unwrap_or_default();
    match (text.split_once("://"), text.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, after))) => format!("{scheme}://{after}"),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn store(text: &str) -> Url {
        match Place::of(Path::new(text)).unwrap() {
            Place::Store(url) => url,
            Place::Directory(path) => panic!("{text} is {path:?}"),
        }
    }

    #[test]
    fn urls_and_paths_are_told_apart() {
        let url = store("s3://bucket/runs/a/");
        assert_eq!((&*url.scheme, &*url.bucket, &*url.path), ("s3", "bucket", "runs/a"));
        assert_eq!(url.to_string(), "s3://bucket/runs/a");
        assert_eq!(store("gs://b").to_string(), "gs://b");
        for (text, directory) in [
            ("runs/a", "runs/a"),
            ("/runs/a", "/runs/a"),
            ("a:b", "a:b"),
            ("file:///runs/a", "/runs/a"),
            ("file://localhost/runs", "/runs"),
            ("C:/runs", "C:/runs"),
        ] {
            assert_eq!(Place::of(Path::new(text)).unwrap(), Place::Directory(directory.into()), "{text}");
        }
    }

    #[test]
    fn what_is_meant_as_a_url_and_is_none_says_what_to_write() {
        for text in [
            "s4://bucket/a",
            "S3A://bucket/a",
            "gcs://bucket/a",
            "http://host/a",
            "s3:///a",
            "s3://",
            "s3:/bucket/a",
            "file://host/a",
            "s3://bucket/../other",
            "s3://bucket/a//b",
            "s3://bucket/a?versionId=1",
        ] {
            let error = Place::of(Path::new(text)).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text}: {error}");
        }
    }

    #[test]
    fn the_url_of_a_step_is_that_of_its_root_and_its_name() {
        let step = |text: &str| StepPlace::of(Path::new(text));
        let store = |root: &str, name: &str| StepPlace::Store(root.into(), name.into());
        assert_eq!(step("s3://b/runs/a/step-7/").unwrap(), store("s3://b/runs/a", "step-7"));
        assert_eq!(step("s3://b/step-7").unwrap(), store("s3://b", "step-7"));
        assert_eq!(step("file:///runs/step-7").unwrap(), StepPlace::Directory("/runs/step-7".into()));
        assert_eq!(step("s3://b").unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn an_error_does_not_repeat_credentials_of_a_url() {
        let error = Place::of(Path::new("s3://key:HIDDEN@bucket/a?token=HIDDEN")).unwrap_err();
        assert!(!error.to_string().contains("HIDDEN"), "{error}");
    }
}
