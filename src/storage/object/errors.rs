//! Interprets the answers of object stores: the kind of error, and whether the same request may succeed
//! later.
//!
//! The crate `object_store` keeps the status and the store's own code only in the text of its errors, so this
//! module reads them from that text. **Secrets.** An error of ours contains only the store's code and
//! message, because bodies can repeat signed text, and addresses can contain a token.

use crate::error::{Error, ErrorKind};
use object_store::Error as Answer;
use std::fmt;

/// The meaning of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meaning {
    pub kind: ErrorKind,
    /// The same request, signed again, may succeed soon.
    pub again: bool,
    /// Advice to the user.
    pub advice: &'static str,
}

impl Meaning {
    const fn last(kind: ErrorKind, advice: &'static str) -> Self {
        Self { kind, again: false, advice }
    }

    const fn passing(kind: ErrorKind, advice: &'static str) -> Self {
        Self { kind, again: true, advice }
    }
}

const FORBIDDEN: Meaning = Meaning::last(ErrorKind::Invalid, "the credentials may not do this: check the policy");

/// True if the object does not exist.
pub(super) fn is_missing(answer: &Answer) -> bool {
    matches!(answer, Answer::NotFound { .. }) && code(&text(answer)) != Some("NoSuchBucket")
}

/// True if the store refused a condition, or says so. That alone never decides the outcome.
pub(super) fn is_refused(answer: &Answer) -> bool {
    matches!(answer, Answer::AlreadyExists { .. } | Answer::Precondition { .. })
}

/// Stands for the missing answer of a store that gives none in time.
pub(super) fn late() -> Answer {
    Answer::Generic { store: "store", source: "the store did not answer in time".into() }
}

/// The text of the crate for an answer without a header such as the ETag. The request was carried out.
const INCOMPLETE: &str = "Header missing from response";

/// True if the store received exactly one request and did not carry it out, so that it was not a repeat of a
/// request that may have been carried out.
pub(super) fn is_certain(answer: &Answer, worked: bool) -> bool {
    let text = text(answer);
    let done = [" retries, max_retries", INCOMPLETE].iter().any(|what| text.contains(what));
    !is_refused(answer) && !meaning(answer, worked).again && !done
}

/// The meaning of `answer` for a client. `worked`: a request of the client has succeeded before.
pub(super) fn meaning(answer: &Answer, worked: bool) -> Meaning {
    use ErrorKind::{Conflict, Invalid, NoSpace, NotFound, Unavailable};
    let text = text(answer);
    let says = |what: &str| text.contains(what);
    match code(&text).unwrap_or_default() {
        "NoSuchBucket" | "ContainerNotFound" => return Meaning::last(Invalid, "no such bucket: check the URL"),
        "RequestTimeTooSkewed" => {
            return Meaning::last(Invalid, "the clock of this machine differs from the store's: set it");
        }
        "QuotaExceeded" | "InsufficientStorage" => {
            return Meaning::last(NoSpace, "the quota of the store is full: delete steps or raise it");
        }
        "ExpiredToken" | "TokenRefreshRequired" => {
            return Meaning::passing(Unavailable, "the credentials have expired: renew them");
        }
        // The crate does not report a refused listing as `PermissionDenied`.
        "AccessDenied" | "AuthorizationFailure" | "AuthorizationPermissionMismatch" => return FORBIDDEN,
        "RequestTimeout" | "BadDigest" | "IncompleteBody" | "XAmzContentSHA256Mismatch" => {
            return Meaning::passing(Unavailable, "the bytes did not arrive whole: check the network");
        }
        "NoSuchUpload" => return Meaning::last(Unavailable, "the upload is gone: it was ended or aborted"),
        "SignatureDoesNotMatch" | "InvalidAccessKeyId" | "AuthenticationFailed" => {
            return Meaning::last(Invalid, "the store does not accept the credentials: check key and secret");
        }
        _ => {}
    }
    if says("status code: 507") {
        return Meaning::last(NoSpace, "the store is full");
    }
    if says("redirect without LOCATION") {
        return Meaning::last(Invalid, "the bucket is in another region: set AWS_REGION to it");
    }
    if says("169.254.169.254") || says("metadata.google.internal") || says("169.254.170.2") {
        let advice = "no credentials were found: set them in the environment, as AWS_ACCESS_KEY_ID and \
            AWS_SECRET_ACCESS_KEY, or run where the cloud gives them (files such as ~/.aws are not read)";
        // Credentials that worked before return when the machine's metadata are available again.
        return if worked { Meaning::passing(Unavailable, advice) } else { Meaning::last(Invalid, advice) };
    }
    if says(INCOMPLETE) {
        let advice =
            "an answer lacks a header that the protocol demands: use a store that speaks the protocol of the URL";
        return Meaning::last(Invalid, advice);
    }
    if let Some(advice) = handshake(&text) {
        // A store that was trusted before is trusted again when its certificate is renewed.
        return if worked { Meaning::passing(Unavailable, advice) } else { Meaning::last(Invalid, advice) };
    }
    match answer {
        Answer::NotFound { .. } => Meaning::last(NotFound, "no such object"),
        // A request without a condition gets this answer while another request changes the same object.
        Answer::AlreadyExists { .. } => Meaning::passing(Unavailable, "another request was changing the same object"),
        Answer::Precondition { .. } | Answer::NotModified { .. } => {
            Meaning::last(Conflict, "the store refused the condition")
        }
        Answer::PermissionDenied { .. } => FORBIDDEN,
        Answer::Unauthenticated { .. } => Meaning::last(Invalid, "the store does not know the credentials: check them"),
        Answer::NotImplemented { .. } | Answer::NotSupported { .. } => {
            Meaning::last(Invalid, "the store cannot do this")
        }
        Answer::InvalidPath { .. } => Meaning::last(Invalid, "the store cannot have such a key"),
        Answer::UnknownConfigurationKey { .. } => Meaning::last(Invalid, "an unknown setting of the store"),
        Answer::JoinError { .. } => Meaning::passing(Unavailable, "a request ended before its answer"),
        _ if says("status code: 400") || says("status code: 501") || says("status code: 405") => {
            Meaning::last(Invalid, "the store does not accept the request")
        }
        _ => Meaning::passing(Unavailable, "the store did not carry out the request: check the network and the store"),
    }
}

/// Advice for a TLS handshake that failed. None for texts of other failures.
fn handshake(text: &str) -> Option<&'static str> {
    let says = |what: &str| text.contains(what);
    if says("No CA certificates were loaded") {
        return Some(
            "this machine has no certificates of authorities: install them, or set SSL_CERT_FILE to a file of them",
        );
    }
    if says("InvalidContentType") {
        return Some("the endpoint does not speak TLS: begin its address, such as AWS_ENDPOINT_URL, with http://");
    }
    if !says("invalid peer certificate") {
        return None;
    }
    // An authority that was created again under its old name has another key.
    Some(if says("UnknownIssuer") || says("BadSignature") {
        "this machine does not trust the authority that signed the endpoint's certificate: set SSL_CERT_FILE to the \
            certificate of that authority"
    } else if says("certificate expired") || says("not valid yet") {
        "the endpoint's certificate is not valid at this time: renew it there, or set the clock of this machine"
    } else if says("not valid for name") {
        "the endpoint's certificate is for another host: check the address of the endpoint, such as AWS_ENDPOINT_URL"
    } else {
        "the endpoint's certificate cannot be used: install another one there"
    })
}

/// The error for `what` on `key` of the store `name`, which failed with `answer`.
pub(super) fn error(what: &str, name: &str, key: &str, answer: &Answer, worked: bool) -> Error {
    let Meaning { kind, advice, .. } = meaning(answer, worked);
    let error = Error::new(kind, format!("cannot {what}: {advice}"));
    error.with_path(format!("{name}/{key}")).with_source(Said(short(&text(answer))))
}

/// The store's own words, for the cause of an error.
#[derive(Debug)]
struct Said(String);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Said {}

/// An answer's text, with the texts of its causes.
fn text(answer: &Answer) -> String {
    let mut text = answer.to_string();
    let mut cause = std::error::Error::source(answer);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// The text between `<tag>` and `</tag>`.
fn element<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{tag}>"))?;
    Some(rest.split_once(&format!("</{tag}>"))?.0)
}

/// The store's own code for an error.
fn code(text: &str) -> Option<&str> {
    element(text, "Code")
}

/// Maximum length of the store's words in an error, in characters.
const MOST_WORDS: usize = 400;

/// The useful part of a text, without secrets.
fn short(text: &str) -> String {
    let said = match (element(text, "Code"), element(text, "Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        _ => text.split(['<', '{']).next().unwrap_or_default().to_owned(),
    };
    // The query of an address may hold a token.
    let plain = said.split_whitespace().map(|word| word.split_once('?').map_or(word, |(before, _)| before));
    plain.collect::<Vec<_>>().join(" ").chars().take(MOST_WORDS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Answer {
        Answer::Generic { store: "S3", source: text.into() }
    }

    fn denied(text: &str) -> Answer {
        Answer::PermissionDenied { path: "a/b".into(), source: text.into() }
    }

    #[test]
    fn every_answer_has_the_kind_by_which_a_caller_can_act() {
        let status = |n: u16, code: &str| {
            format!(
                "Server returned non-2xx status code: {n} x: <Error><Code>{code}</Code><Message>m</Message></Error>"
            )
        };
        let cases = [
            (denied(&status(403, "AccessDenied")), ErrorKind::Invalid, false),
            (generic(&status(403, "AccessDenied")), ErrorKind::Invalid, false),
            (denied(&status(403, "SignatureDoesNotMatch")), ErrorKind::Invalid, false),
            (denied(&status(403, "RequestTimeTooSkewed")), ErrorKind::Invalid, false),
            (denied(&status(403, "QuotaExceeded")), ErrorKind::NoSpace, false),
            (generic(&status(400, "ExpiredToken")), ErrorKind::Unavailable, true),
            (generic(&status(507, "X")), ErrorKind::NoSpace, false),
            (generic(&status(400, "EntityTooSmall")), ErrorKind::Invalid, false),
            (generic(&status(400, "RequestTimeout")), ErrorKind::Unavailable, true),
            (generic(&status(400, "BadDigest")), ErrorKind::Unavailable, true),
            (generic(&status(400, "IncompleteBody")), ErrorKind::Unavailable, true),
            (generic(&status(400, "XAmzContentSHA256Mismatch")), ErrorKind::Unavailable, true),
            (generic(&status(501, "NotImplemented")), ErrorKind::Invalid, false),
            (generic(&status(503, "SlowDown")), ErrorKind::Unavailable, true),
            (generic(&status(429, "TooManyRequests")), ErrorKind::Unavailable, true),
            (generic("Received redirect without LOCATION, this normally"), ErrorKind::Invalid, false),
            (generic("HTTP error: operation timed out"), ErrorKind::Unavailable, true),
            (
                Answer::NotFound { path: "k".into(), source: status(404, "NoSuchKey").into() },
                ErrorKind::NotFound,
                false,
            ),
            (
                Answer::AlreadyExists { path: "k".into(), source: status(409, "OperationAborted").into() },
                ErrorKind::Unavailable,
                true,
            ),
            (
                Answer::NotFound { path: "k".into(), source: status(404, "NoSuchBucket").into() },
                ErrorKind::Invalid,
                false,
            ),
        ];
        for (answer, kind, again) in cases {
            let meaning = meaning(&answer, false);
            assert_eq!((meaning.kind, meaning.again), (kind, again), "{answer}");
        }
    }

    #[test]
    fn a_machine_without_metadata_is_final_at_first_and_passing_once_a_request_has_worked() {
        let answer = generic("error sending request for url (http://169.254.169.254/latest/api/token): 503");
        let (first, later) = (meaning(&answer, false), meaning(&answer, true));
        assert_eq!((first.kind, first.again), (ErrorKind::Invalid, false));
        assert_eq!((later.kind, later.again), (ErrorKind::Unavailable, true));
        assert_eq!(first.advice, later.advice);
    }

    #[test]
    fn a_certificate_that_fails_is_final_at_first_and_passing_once_a_request_has_worked() {
        let answer = generic("error sending request: client error (Connect): invalid peer certificate: UnknownIssuer");
        let (first, later) = (meaning(&answer, false), meaning(&answer, true));
        assert_eq!((first.kind, first.again), (ErrorKind::Invalid, false));
        assert_eq!((later.kind, later.again), (ErrorKind::Unavailable, true));
        assert!(first.advice == later.advice && first.advice.contains("SSL_CERT_FILE"), "{}", first.advice);
    }

    #[test]
    fn an_answer_without_a_version_is_final_and_leaves_open_whether_the_request_was_done() {
        let answer = generic("Error performing PUT: ETag Header missing from response");
        let found = meaning(&answer, true);
        assert_eq!((found.kind, found.again), (ErrorKind::Invalid, false));
        assert!(!is_certain(&answer, true));
        assert!(is_certain(&generic("status code: 400"), true));
    }

    #[test]
    fn no_error_repeats_what_was_signed_or_a_token() {
        let body = "status code: 403: <Error><Code>SignatureDoesNotMatch</Code><Message>no</Message>\
            <StringToSign>HIDDEN</StringToSign></Error>";
        let shown = format!("{:?}", error("put", "s3://bucket", "a", &denied(body), false));
        assert!(!shown.contains("HIDDEN") && shown.contains("SignatureDoesNotMatch: no"), "{shown}");
        let address = generic("error sending request for url (https://a.blob/c?sv=1&sig=HIDDEN)");
        let shown = format!("{:?}", error("put", "az://c", "a", &address, false));
        assert!(!shown.contains("HIDDEN") && shown.contains("path=az://c/a"), "{shown}");
    }
}
