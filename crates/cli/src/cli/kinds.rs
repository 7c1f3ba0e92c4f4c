//! Which kind and which objects a command line means.

use super::exit::Exit;
use super::report::{Failure, Outcome, Report, closest};
use super::session::Session;
use crate::client::Resource;

/// Objects of one kind: all of them, or those named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The kind.
    pub resource: Resource,
    /// Their names; none means all.
    pub names: Vec<String>,
}

fn matches(resource: &Resource, word: &str) -> bool {
    let word = word.to_lowercase();
    let word = word.strip_suffix(".krake.dev").unwrap_or(&word);
    resource.name == word
        || resource.singular_name == word
        || resource.kind.to_lowercase() == word
        || resource.short_names.iter().any(|short| short == word)
}

/// The kind that `word` names: singular, plural, short, or with its group.
///
/// # Errors
/// When there is none; says which there are.
pub fn find<'a>(resources: &'a [Resource], word: &str) -> Outcome<&'a Resource> {
    if let Some(found) = resources.iter().find(|resource| matches(resource, word)) {
        return Ok(found);
    }
    let names = || {
        resources.iter().flat_map(|resource| {
            std::iter::once(resource.name.as_str())
                .chain(std::iter::once(resource.singular_name.as_str()))
                .chain(resource.short_names.iter().map(String::as_str))
        })
    };
    let report = Report::new(
        Exit::NotFound,
        "unknown-kind",
        format!("the federation has no kind `{word}`"),
    );
    let all: Vec<&str> = resources.iter().map(|r| r.name.as_str()).collect();
    Err(match closest(word, names()) {
        Some(close) => report.help(format!("did you mean `{close}`?")),
        None => report.help(format!("there are: {}", all.join(", "))),
    }
    .into())
}

/// Reads `KIND NAME…`, `KIND,KIND` or `KIND/NAME…`.
///
/// # Errors
/// When a kind does not exist, or both forms are mixed.
pub async fn select(session: &Session, what: &[String]) -> Outcome<Vec<Selection>> {
    let resources = session.client.resources().await?;
    let slashed = what.iter().filter(|word| word.contains('/')).count();
    if slashed > 0 {
        if slashed != what.len() {
            return Err(usage("write either KIND NAME… or KIND/NAME…, not both"));
        }
        let mut selections: Vec<Selection> = Vec::new();
        for word in what {
            let (kind, name) = word.split_once('/').unwrap_or((word, ""));
            if name.is_empty() {
                return Err(usage("write KIND/NAME, such as app/shop"));
            }
            let resource = find(&resources, kind)?;
            match selections.iter_mut().find(|s| s.resource == *resource) {
                Some(selection) => selection.names.push(name.to_owned()),
                None => selections.push(Selection {
                    resource: resource.clone(),
                    names: vec![name.to_owned()],
                }),
            }
        }
        return Ok(selections);
    }
    let Some((kinds, names)) = what.split_first() else {
        return Err(usage("name a kind, such as apps"));
    };
    let kinds: Vec<&str> = kinds.split(',').filter(|kind| !kind.is_empty()).collect();
    if kinds.len() > 1 && !names.is_empty() {
        return Err(usage("several kinds and names do not go together"));
    }
    kinds
        .into_iter()
        .map(|kind| {
            Ok(Selection {
                resource: find(&resources, kind)?.clone(),
                names: names.to_vec(),
            })
        })
        .collect()
}

/// The same, where each object must be named.
///
/// # Errors
/// As [`select`], and when no name is given.
pub async fn select_named(session: &Session, what: &[String]) -> Outcome<Vec<Selection>> {
    let selections = select(session, what).await?;
    match selections.iter().find(|s| s.names.is_empty()) {
        Some(selection) => Err(usage(&format!(
            "name the {} too: {} NAME",
            selection.resource.singular_name, selection.resource.singular_name
        ))),
        None => Ok(selections),
    }
}

fn usage(message: &str) -> Failure {
    Report::new(Exit::Usage, "usage", message).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_many_names() {
        let resources = [Resource {
            short_names: vec!["app".to_owned(), "apps".to_owned()],
            ..Resource::applications()
        }];
        for word in [
            "applications",
            "Application",
            "app",
            "apps",
            "applications.krake.dev",
        ] {
            assert!(find(&resources, word).is_ok(), "{word}");
        }
        let failure = find(&resources, "aplications").unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
        assert_eq!(failure.reports[0].help, ["did you mean `applications`?"]);
    }
}
